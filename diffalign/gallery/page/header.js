"use strict";
// The top of the page: title, what the reader should know, whether the cards match, and which two systems are compared.
{
  const G = window.Gallery;

  const names = () => G.systems.map((system, i) => [String(i), system.name]);

  G.renderHeader = () => {
    const { title, subtitle } = G.manifest;
    document.title = title || "Gallery";
    G.$("top").replaceChildren(
      G.el("div", { class: "titles" },
        G.el("h1", {}, title || "Gallery"), subtitle ? G.el("p", { class: "soft" }, subtitle) : null),
      G.el("nav", { "aria-label": "Page tools" },
        G.canVote()
          ? G.el("a", { class: "button strong", id: "to-vote", href: G.link({ view: "vote" }) }, "Vote blind") : null,
        G.button("Dark or light", () => G.say(`The page is ${window.toggleTheme()} now.`), { id: "theme" }),
        G.button("Keys", G.help, { id: "to-help", "aria-label": "Keyboard help" })));
  };

  function pairBar() {
    const { a, b, reward } = G.state;
    const swap = () => G.go({ a: G.state.b, b: G.state.a });
    return G.el("div", { class: "pair-bar" },
      G.field("A, the baseline", G.select(names(), String(a), (v) => G.go({ a: Number(v) }), { id: "system-a" })),
      G.button("\u21c4", swap, { "aria-label": "Swap A and B", class: "swap" }),
      G.field("B, compared with it", G.select(names(), String(b), (v) => G.go({ b: Number(v) }), { id: "system-b" })),
      G.rewards.length ? G.field("Judged by", G.select(
        G.rewards.map(({ name, role }) => [name, `${name} (${role})`]), reward, (v) => G.go({ reward: v }), { id: "judge" })) : null);
  }

  function verdict() {
    const unlike = G.manifest.unlike || [];
    if (unlike.length)
      return G.el("div", { class: "notice warn", id: "unlike" },
        G.el("strong", {}, "The evaluation cards differ: part of any difference may come from this."),
        G.el("ul", {}, unlike.map((sentence) => G.el("li", {}, sentence))));
    const known = G.systems.every((system) => system.card);
    if (G.pair) return G.el("p", { class: "notice", id: "unlike" }, known
      ? "\u2713 The evaluation cards of all systems match."
      : "Not every system has an evaluation card, so whether conditions were equal is not known.");
    return null;
  }

  const asText = (value) =>
    value === undefined || value === null ? "\u2013" : typeof value === "string" ? value : JSON.stringify(value);

  /** One row per field of the cards, so that what differs can be read across. */
  function cards() {
    const keys = [...new Set(G.systems.flatMap((system) => Object.keys(system.card || {})))];
    const rows = keys.map((key) => {
      const values = G.systems.map((system) => asText((system.card || {})[key]));
      const same = values.every((value) => value === values[0]);
      return [key, ...values.map((value) => G.el("code", {}, G.cut(value, 400))), ...(G.pair ? [same ? "same" : "differs"] : [])];
    });
    const commands = G.systems.filter((system) => system.command);
    if (!rows.length && !commands.length) return null;
    return G.el("details", { id: "cards" },
      G.el("summary", {}, "Evaluation cards and commands"),
      rows.length ? G.table("Evaluation cards", ["Field", ...G.systems.map(({ name }) => name), ...(G.pair ? ["Match"] : [])], rows) : null,
      commands.map((system) => G.el("div", {}, G.el("h3", {}, system.name), G.commandBox(system.command, `Command of ${system.name}`))));
  }

  /** A command that can be copied. */
  G.commandBox = (command, label) => {
    const code = G.el("code", {}, command);
    const button = G.button("Copy", async () => {
      if (await G.copy(command, code)) button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    return G.el("div", { class: "command" },
      G.el("pre", { class: "scrolls", tabindex: "0", role: "region", "aria-label": label }, code), button);
  };

  G.renderSummary = () => {
    const notes = G.manifest.notes || [];
    G.$("summary").hidden = false;
    G.$("summary").replaceChildren(...[
      G.pair ? pairBar() : null,
      verdict(),
      notes.length ? G.el("ul", { class: "notice notes" }, notes.map((note) => G.el("li", {}, note))) : null,
      G.pair ? G.pairTable() : null,
      G.systemTable(),
      cards(),
    ].filter(Boolean));
  };

  G.renderFoot = () => {
    const { made, command } = G.manifest;
    G.$("foot").replaceChildren(...[
      G.el("p", {}, [G.count(G.entries.length, "entry", "entries"), G.count(G.systems.length, "system"),
        made ? `made ${made}` : null].filter(Boolean).join(" \u00b7 ")),
      command ? G.commandBox(command, "Command that made this page") : null,
    ].filter(Boolean));
  };
}
