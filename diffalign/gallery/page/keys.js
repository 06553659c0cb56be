"use strict";
// The keyboard, and the dialog that explains it.
{
  const G = window.Gallery;
  let on = true;

  const KEYS = [
    ["/", "Search"], ["v", "Vote blind, or stop voting"], ["?", "This help"], ["Esc", "Close what is open"],
    ["\u2190 \u2192", "Previous, next entry"], ["\u2191 \u2193", "Move the divider of the slider"],
    ["s", "Slider, or side by side"], ["f", "Flicker; again: the other image"], ["a", "All systems"],
    ["z", "Zoom: fit, 1\u00d7, 2\u00d7"], ["p", "Play or pause"],
    ["1 2 0", "Vote: left, right, no difference"], ["u", "Undo the last vote"], ["r", "Result of the votes"],
  ];

  G.help = () => {
    const dialog = G.$("help");
    const box = G.el("input", { type: "checkbox", checked: on, onchange: () => (on = box.checked) });
    dialog.replaceChildren(
      G.el("h2", { id: "help-title" }, "Keys"),
      G.el("dl", { class: "keys" }, KEYS.flatMap(([key, what]) => [
        G.el("dt", {}, key.split(" ").map((one) => [G.el("kbd", {}, one), " "]).flat()), G.el("dd", {}, what)])),
      G.el("p", { class: "soft" }, "The mouse wheel or two fingers zoom; dragging moves the divider, or the image once it is zoomed."),
      G.el("label", { class: "check" }, box, " Single keys are on"),
      G.button("Close", () => dialog.close(), { autofocus: true }));
    if (!dialog.open) dialog.showModal();
  };

  const LIST_KEYS = {
    "/": () => {
      G.$("search").focus();
      G.$("search").select();
    },
    v: () => G.$("to-vote") && G.$("to-vote").click(),
  };

  /** Whether the key belongs to the control that has the focus. */
  function taken({ target, key }) {
    if (target.closest("textarea, select, input:not([type=range]):not([type=checkbox])") || target.isContentEditable) return true;
    if (!key.startsWith("Arrow")) return false;
    return target.matches("input[type=range]") || (key !== "ArrowLeft" && key !== "ArrowRight" && Boolean(target.closest(".scrolls, .facts")));
  }

  function table() {
    if (G.$("help").open) return {};
    if (G.$("vote").open) return G.voteKeys;
    return G.$("detail").open ? { ...G.detailKeys, v: LIST_KEYS.v } : LIST_KEYS;
  }

  G.watchKeys = () => addEventListener("keydown", (event) => {
    if (!on || event.ctrlKey || event.metaKey || event.altKey || taken(event)) return;
    const action = event.key === "?" ? G.help : table()[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}
