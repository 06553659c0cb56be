"use strict";
// One entry at full size: a dialog with the stage, its controls and the facts.
{
  const G = window.Gallery;
  const MODES = [["slider", "Slider"], ["flicker", "Flicker"], ["side", "Side by side"], ["strip", "All systems"]];
  let stage, parts, came = false, moved = false;
  let current = {}; // id of the entry on stage, and a key of everything it is drawn from

  const modes = () => MODES.filter(([mode]) => mode !== "strip" || G.systems.length > 2);
  const mode = () => (!G.pair ? "strip" : modes().some(([name]) => name === G.state.mode) ? G.state.mode : "slider");
  const shownSystems = () => (mode() === "strip" ? G.systems.map((_, i) => i) : [G.state.a, G.state.b]);

  function build() {
    const zoom = G.zoomBar();
    stage = G.createStage((now) => follow(now, zoom));
    zoom.stage = stage;
    parts = {
      title: G.el("h2", { id: "detail-title", tabindex: -1, autofocus: true }),
      live: G.el("p", { class: "live unseen", role: "status" }),
      modes: modes().map(([name, label]) => [name, G.button(label, () => G.go({ mode: name }))]),
      swap: G.button("Swap", G.flicker),
      auto: G.button("Auto", () => stage.autoFlicker(!stage.auto)),
      facts: G.el("div", { class: "facts", role: "region", "aria-label": "Facts", tabindex: "0" }),
      now: G.el("p", { class: "now plate", "aria-hidden": "true" }),
    };
    parts.flicker = G.el("div", { class: "group", role: "group", "aria-label": "Flicker" }, parts.swap, parts.auto);
    if (G.calm()) parts.auto.disabled = true;
    G.$("detail").replaceChildren(
      G.el("div", { class: "bar" },
        parts.title,
        G.el("div", { class: "group", role: "group", "aria-label": "Entries" },
          G.button("\u2190", () => G.step(-1), { "aria-label": "Previous entry" }),
          G.button("\u2192", () => G.step(1), { "aria-label": "Next entry" })),
        G.pair ? G.el("div", { class: "group", role: "group", "aria-label": "View" }, parts.modes.map(([, button]) => button)) : null,
        parts.flicker, zoom,
        G.button("Copy link", copyLink),
        G.button("Close", G.close, { class: "close" })),
      G.el("div", { class: "body" }, stage.node, parts.facts), parts.live);
    G.$("detail").addEventListener("cancel", (event) => {
      event.preventDefault();
      G.close();
    });
    G.$("detail").addEventListener("close", ({ target }) => current.id !== undefined && !target.open && G.close()); // closed by the browser
  }

  async function copyLink() {
    const full = location.href.split("#")[0] + G.link({ mode: mode() });
    await G.copy(full, parts.title);
  }

  function follow(now, zoom) {
    zoom.follow(now);
    if (!parts) return;
    parts.flicker.hidden = now.mode !== "flicker";
    parts.auto.setAttribute("aria-pressed", String(Boolean(now.auto)));
  }

  function items(entry, systems) {
    return systems.map((i, place) => {
      const letter = G.pair && systems.length === 2 ? `${"AB"[place]} \u00b7 ` : "";
      const label = letter + G.systems[i].name;
      return { shot: entry.shots[i], label, alt: `${label}: ${G.cut(entry.prompt, 200)}` };
    });
  }

  /** Open, change or close the dialog, as the state says. */
  G.renderDetail = () => {
    const dialog = G.$("detail");
    const entry = G.state.entry === null || G.state.view ? null : G.byId.get(G.state.entry);
    if (!entry) {
      if (current.id !== undefined) leave(dialog);
      return;
    }
    if (!stage) build();
    if (!dialog.open) dialog.showModal();
    show(entry);
  };

  function show(entry) {
    const key = [entry.id, G.state.a, G.state.b, mode()].join(" ");
    if (key === current.key) return;
    const fresh = current.id !== entry.id;
    current = { id: entry.id, key };
    const among = walk();
    const place = among.indexOf(entry);
    parts.title.textContent = `Entry ${place + 1} of ${among.length}`;
    for (const [name, button] of parts.modes) button.setAttribute("aria-pressed", String(name === mode()));
    const systems = shownSystems();
    // A reason for a missing image cannot be read through a slider.
    const whole = systems.every((i) => G.mediaOf(entry.shots[i]));
    stage.show(items(entry, systems), whole || mode() === "strip" ? mode() : "side");
    if (fresh) stage.setZoom("fit");
    parts.facts.replaceChildren(...G.facts(entry, systems));
    if (fresh) parts.facts.scrollTop = 0;
    G.say(`${parts.title.textContent}: ${G.cut(entry.prompt, 120)}`);
    G.preload(among[place + 1], systems);
  }

  function leave(dialog) {
    const { id } = current;
    current = {};
    stage.empty();
    dialog.close();
    G.fitList();
    if (moved) G.reveal(id);
    moved = came = false;
  }

  // A permalink may name what the filters hide; then the walk is over all entries.
  const walk = () => (G.shown().some(({ id }) => id === G.state.entry) ? G.shown() : G.entries);

  G.step = (by) => {
    const among = walk();
    const next = among[among.findIndex(({ id }) => id === G.state.entry) + by];
    if (!next) return G.say(by > 0 ? "This is the last entry." : "This is the first entry.");
    moved = true;
    G.go({ entry: next.id });
  };

  G.cameFromPage = () => (came = true);

  /** Back to the list: a step back in the history if the list is there, so that Back and Close agree. */
  G.close = () => {
    if (came) history.back();
    else G.go({ entry: null, view: null });
    came = false;
  };

  G.flicker = () => {
    if (mode() !== "flicker") return G.go({ mode: "flicker" });
    stage.swap();
    G.say(`Shown: ${"AB"[stage.front]}`);
  };

  G.detailKeys = {
    ArrowLeft: () => G.step(-1),
    ArrowRight: () => G.step(1),
    ArrowUp: () => mode() === "slider" && stage.setSplit(stage.split + 5),
    ArrowDown: () => mode() === "slider" && stage.setSplit(stage.split - 5),
    f: () => G.pair && G.flicker(),
    s: () => G.pair && G.go({ mode: mode() === "slider" ? "side" : "slider" }),
    a: () => G.systems.length > 2 && G.go({ mode: "strip" }),
    z: () => stage.cycleZoom(),
    p: () => stage.clock.toggle(),
  };
}
