"use strict";
// Runs before the first paint, so that a remembered theme does not flash.
{
  const KEY = "diffalign-gallery:theme";
  const root = document.documentElement;
  let kept = null;
  try {
    kept = localStorage.getItem(KEY);
  } catch {
    // storage can be forbidden; the theme then lasts as long as the page
  }
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;

  window.toggleTheme = () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try {
      localStorage.setItem(KEY, root.dataset.theme);
    } catch {
      // see above
    }
    return root.dataset.theme;
  };
}
