"use strict";
// Address and start: the hash says which entry, pair and view is open, so a link repeats it and Back undoes it.
{
  const G = window.Gallery;
  let drawn = ""; // pair and reward that the page was last drawn for

  /** The address of the present state with some changes. */
  G.link = (changes) => {
    const { entry, view, a, b, mode } = { entry: null, view: null, a: G.state.a, b: G.state.b, ...changes };
    const hash = new URLSearchParams();
    if (entry !== null) hash.set("entry", entry);
    if (view) hash.set("view", view);
    hash.set("a", a);
    hash.set("b", b);
    if (entry !== null && mode) hash.set("mode", mode);
    return `#${hash}`;
  };

  /** Change the state in place, without a new step in the history. */
  G.go = (changes) => {
    Object.assign(G.state, changes);
    history.replaceState(null, "", G.link(G.state));
    render();
  };

  function readHash() {
    const hash = new URLSearchParams(location.hash.slice(1));
    const system = (name, otherwise) => (/^\d+$/.test(hash.get(name) || "") && G.systems[hash.get(name)] ? Number(hash.get(name)) : otherwise);
    Object.assign(G.state, {
      entry: hash.get("entry"), view: hash.get("view"), mode: hash.get("mode") || G.state.mode,
      a: system("a", 0), b: system("b", G.pair ? 1 : 0),
    });
    if (G.state.view !== "vote" || !G.canVote()) G.state.view = null;
  }

  function unknownEntry() {
    const { entry } = G.state;
    const unknown = entry !== null && !G.byId.has(entry);
    G.$("message").replaceChildren(...(unknown
      ? [G.el("p", { class: "notice warn" }, `This gallery has no entry \u201c${G.cut(entry, 80)}\u201d. The link may belong to another one.`)]
      : []));
  }

  function render() {
    const now = [G.state.a, G.state.b, G.state.reward].join(" ");
    if (now !== drawn) {
      const focus = document.activeElement && document.activeElement.id;
      drawn = now;
      G.renderHeader();
      G.renderSummary();
      G.renderStrips();
      G.renderToolbar();
      G.renderList();
      if (focus && G.$(focus)) G.$(focus).focus({ preventScroll: true }); // the control that caused this was drawn anew
    }
    unknownEntry();
    G.renderDetail();
    G.renderVote();
  }

  function onHash() {
    const open = G.state.entry !== null || G.state.view !== null;
    readHash();
    if (!open && (G.state.entry !== null || G.state.view !== null)) G.cameFromPage();
    render();
  }

  function complain(text) {
    document.title = "Gallery: nothing to show";
    G.$("message").replaceChildren(G.el("h1", {}, "This gallery cannot be shown"), G.el("p", { class: "notice warn" }, text));
    for (const id of ["summary", "strips", "curves", "browse"]) G.$(id).hidden = true;
  }

  function start() {
    const problem = G.problem(window.DIFFALIGN_MANIFEST);
    if (problem) return complain(problem);
    G.prepare(window.DIFFALIGN_MANIFEST);
    G.loadVotes();
    readHash();
    G.$("browse").hidden = false;
    G.renderCurves();
    render();
    G.renderFoot();
    G.watchList();
    G.watchKeys();
    addEventListener("hashchange", onHash);
    G.$("skip").addEventListener("click", (event) => {
      event.preventDefault(); // the hash is taken
      G.$("entries").focus();
    });
  }

  try {
    start();
  } catch (error) {
    complain(`The manifest could not be read: ${error.message}. Write the page again with diffalign gallery.`);
    throw error;
  }
}
