"use strict";
// The one namespace of the page, and what every part of it needs: elements, numbers, paths, spoken notices.
window.Gallery = {};
{
  const G = window.Gallery;
  const MINUS = "\u2212";

  function fill(node, props, children) {
    for (const [name, value] of Object.entries(props || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") Object.assign(node.style, value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  // Strings among the children become text nodes: nothing a manifest says is ever read as markup.
  G.el = (tag, props, ...children) => fill(document.createElement(tag), props, children);
  G.svg = (tag, props, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
  G.$ = (id) => document.getElementById(id);

  G.button = (label, onclick, props) => G.el("button", { type: "button", onclick, ...props }, label);

  G.select = (options, value, onchange, props) => {
    const node = G.el("select", { onchange: () => onchange(node.value), ...props });
    for (const [key, label] of options) node.append(G.el("option", { value: key }, label));
    node.value = value;
    return node;
  };

  G.field = (label, control) => G.el("label", { class: "field" }, G.el("span", {}, label), control);

  G.table = (caption, head, rows, props) =>
    G.el("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": caption, ...props },
      G.el("table", {},
        G.el("caption", {}, caption),
        G.el("thead", {}, G.el("tr", {}, head.map((cell) => G.el("th", { scope: "col" }, cell)))),
        G.el("tbody", {}, rows.map(([first, ...cells]) =>
          G.el("tr", {}, G.el("th", { scope: "row" }, first), cells.map((cell) => G.el("td", {}, cell)))))));

  // A path of a manifest names a file of this folder and nothing else.
  G.url = (path) => {
    if (typeof path !== "string" || !path || /^\/|^[a-z][a-z0-9+.-]*:|\\/i.test(path)) return null;
    const parts = path.split("/");
    return parts.includes("..") ? null : parts.map(encodeURIComponent).join("/");
  };

  G.isNumber = (value) => typeof value === "number" && Number.isFinite(value);

  G.number = (value, decimals = 3) => {
    if (!G.isNumber(value)) return "\u2013";
    let text = value.toFixed(decimals);
    if (value !== 0 && Number(text) === 0) text = String(Number(value.toPrecision(1)));
    return text.replace("-", MINUS);
  };

  G.signed = (value, decimals) => (value > 0 ? "+" : "") + G.number(value, decimals);
  G.amount = (value) =>
    G.isNumber(value) ? value.toLocaleString("en", { maximumSignificantDigits: 4 }).replace("-", MINUS) : "\u2013";
  G.percent = (value) => (G.isNumber(value) ? `${(100 * value).toFixed(1)} %` : "\u2013");
  G.pValue = (p) => (!G.isNumber(p) ? "\u2013" : p < 0.001 ? "< 0.001" : p.toFixed(3));
  G.cut = (text, most) => (text.length > most ? `${text.slice(0, most).trimEnd()}\u2026` : text);
  G.count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

  // Sign and colour say the same, for those who see only one of them.
  // A mean whose interval holds 0 is no gain and no loss: `unsure`.
  G.delta = (value, decimals, unsure = false) => {
    const kind = !G.isNumber(value) ? "none" : unsure || value === 0 ? "flat" : value > 0 ? "up" : "down";
    return G.el("span", { class: `delta ${kind}` }, G.signed(value, decimals));
  };

  // What lies outside an open dialog is inert and not read out, so each dialog has a status line of its own.
  G.say = (text) => {
    const open = [...document.querySelectorAll("dialog[open]")].pop();
    const live = (open && open.querySelector(".live")) || G.$("live");
    live.textContent = text;
  };

  G.calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

  G.copy = async (text, node) => {
    try {
      await navigator.clipboard.writeText(text);
      G.say("Copied.");
      return true;
    } catch {
      getSelection().selectAllChildren(node);
      G.say("The browser refused to copy; the text is selected.");
      return false;
    }
  };
}
