"use strict";
// Toolbar and windowed list: of thousands of entries only the cards near the screen exist.
{
  const G = window.Gallery;
  const GAP = 16;
  const LEAST = 300; // px, of a card
  const OVERSCAN = 2; // rows above and below the screen
  const REWARDS = 4; // shown on a card; the detail view shows them all
  const cards = new Map(); // place in the list -> element
  let shown = [];
  let grid = { columns: 1, width: 0, row: 1, total: 0 };
  let asked = false;

  function sorts() {
    const rewards = G.rewards.flatMap(({ name }) => G.pair
      ? [[`up:${name}`, `${name}: B worst first`], [`dn:${name}`, `${name}: B best first`]]
      : [[`up:${name}`, `${name}: lowest first`], [`dn:${name}`, `${name}: highest first`]]);
    const more = G.pair && G.rewards.length > 1 ? [["disagree", "Rewards disagree most"]] : [];
    return [["order", "As made"], ...rewards, ["prompt", "Prompt"], ...more];
  }

  G.renderToolbar = () => {
    const { q, tag, outcome, sort } = G.state;
    const search = G.el("input", { type: "search", id: "search", value: q, autocomplete: "off", spellcheck: "false",
      oninput: () => G.filter({ q: search.value }) });
    const tags = [["", "All tags"], ...G.tags().map(([name, n]) => [name, `${name} (${n})`])];
    const outcomes = [["all", "All outcomes"], ["win", "B wins"], ["loss", "B loses"], ["tie", "Ties"],
      ["disagree", "Rewards disagree"]];
    G.$("toolbar").replaceChildren(...[
      G.field("Search prompts", search),
      tags.length > 1 ? G.field("Tag", G.select(tags, tag, (v) => G.filter({ tag: v }), { id: "tag" })) : null,
      G.pair && G.rewards.length
        ? G.field("Outcome", G.select(outcomes, outcome, (v) => G.filter({ outcome: v }), { id: "outcome" })) : null,
      G.field("Sort", G.select(sorts(), sort, (v) => G.filter({ sort: v }), { id: "sort" })),
      G.el("p", { id: "count", role: "status" }),
    ].filter(Boolean));
  };

  G.filter = (changes) => {
    Object.assign(G.state, changes);
    G.renderList();
  };

  function scoreRow(entry, reward) {
    const { a, b } = G.state;
    const show = (system) => G.number(G.score(entry, system, reward.name), reward.decimals);
    return G.el("li", { class: "score" },
      G.el("span", { class: "name" }, reward.name),
      G.el("span", { class: "soft" }, G.pair ? `${show(a)} \u2192 ${show(b)}` : show(a)),
      G.pair ? G.delta(G.gain(entry, reward.name), reward.decimals) : null);
  }

  const shot = (entry, system, letter) =>
    G.shotBox(entry, system, letter, `${letter && `${letter}, `}${G.systems[system].name}`);

  function build(place) {
    const entry = shown[place];
    const { a, b } = G.state;
    const about = [entry.seed === null || entry.seed === undefined ? null : `seed ${entry.seed}`, ...entry.tags].filter(Boolean);
    return G.el("li", { class: "card", "aria-setsize": shown.length, "aria-posinset": place + 1, "data-entry": entry.id },
      G.el("div", { class: "duo" },
        G.pair ? [shot(entry, a, "A"), shot(entry, b, "B")] : shot(entry, a, "")),
      G.el("h3", {}, G.el("a", { href: G.link({ entry: entry.id }), dir: "auto" }, G.cut(entry.prompt, 300) || "(no prompt)")),
      G.el("ul", { class: "scores" }, G.rewards.slice(0, REWARDS).map((reward) => scoreRow(entry, reward))),
      G.el("p", { class: "tags soft" }, about.join(" \u00b7 ")));
  }

  /** Every part of a card has a fixed number of lines, so one card tells the height of all. */
  function measure() {
    const host = G.$("list");
    const total = host.clientWidth;
    const columns = Math.max(1, Math.floor((total + GAP) / (LEAST + GAP)));
    const width = (total - (columns - 1) * GAP) / columns;
    const media = G.mediaOf(G.entries.flatMap((entry) => entry.shots).find(G.mediaOf));
    const shape = media && media.width && media.height ? media.width / media.height : 1;
    host.style.setProperty("--shape", Math.min(1.8, Math.max(0.7, shape)));
    const probe = build(0);
    Object.assign(probe.style, { width: `${width}px`, visibility: "hidden" });
    host.append(probe);
    grid = { columns, width, total, row: probe.offsetHeight + GAP };
    probe.remove();
    host.style.height = `${Math.ceil(shown.length / columns) * grid.row - GAP}px`;
  }

  function put(place) {
    const card = build(place);
    const [x, y] = [(place % grid.columns) * (grid.width + GAP), Math.floor(place / grid.columns) * grid.row];
    Object.assign(card.style, { width: `${grid.width}px`, transform: `translate(${x}px, ${y}px)` });
    card.place = place;
    cards.set(place, card);
    const after = [...G.$("list").children].find((other) => other.place > place);
    G.$("list").insertBefore(card, after || null); // the order of elements is the order of the tab key
  }

  function paint() {
    asked = false;
    if (!shown.length) return;
    const top = G.$("list").getBoundingClientRect().top;
    const rows = Math.ceil(shown.length / grid.columns);
    // The nearest rows exist even when the list is off the screen: Tab and screen readers enter through them.
    const above = Math.min(Math.floor(-top / grid.row), rows - 1) - OVERSCAN;
    const below = Math.max(Math.ceil((innerHeight - top) / grid.row), 0) + OVERSCAN;
    const [first, last] = [above * grid.columns, below * grid.columns];
    for (const [place, card] of cards) {
      if ((place >= first && place < last) || card.contains(document.activeElement)) continue;
      card.remove();
      cards.delete(place);
    }
    for (let place = Math.max(0, first); place < Math.min(shown.length, last); place++)
      if (!cards.has(place)) put(place);
  }

  function lay() {
    cards.clear();
    G.$("list").replaceChildren();
    if (shown.length) measure();
    else G.$("list").style.height = "0";
    paint();
  }

  G.renderList = () => {
    shown = G.chosen();
    const all = G.entries.length;
    G.$("count").textContent = shown.length === all
      ? G.count(all, "entry", "entries") : `${shown.length.toLocaleString("en")} of ${G.count(all, "entry", "entries")}`;
    G.$("nothing").hidden = shown.length > 0;
    G.$("nothing").textContent = all
      ? "No entry fits the search and the filters." : "This gallery holds no entries. The notes above may say why.";
    lay();
  };

  G.shown = () => shown;

  /** Scroll to an entry and focus it; it may have no element yet. */
  G.reveal = (id) => {
    const place = shown.findIndex((entry) => entry.id === id);
    if (place < 0) return;
    const top = G.$("list").getBoundingClientRect().top + Math.floor(place / grid.columns) * grid.row;
    if (top < 0 || top + grid.row > innerHeight) scrollBy({ top: top - 120, behavior: "instant" });
    paint();
    cards.get(place).querySelector("a").focus({ preventScroll: true });
  };

  // An open dialog hides the page's scroll bar; laying the list anew for that would lose the focus to come back to.
  G.fitList = () => {
    if (G.$("list").clientWidth !== grid.total && !document.querySelector("#detail[open], #vote[open]")) lay();
  };

  G.watchList = () => {
    const ask = () => {
      if (!asked) requestAnimationFrame(paint);
      asked = true;
    };
    addEventListener("scroll", ask, { passive: true });
    addEventListener("resize", ask);
    new ResizeObserver(G.fitList).observe(G.$("list"));
  };
}
