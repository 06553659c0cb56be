"use strict";
// Blind voting: two images without names, scores, seeds or file names; the sides were drawn by chance (votes.js).
{
  const G = window.Gallery;
  let stage, parts, plan = [], at = 0, drawn = null, showing = false;

  function build() {
    const zoom = G.zoomBar();
    stage = G.createStage((now) => zoom.follow(now));
    zoom.stage = stage;
    const name = G.el("input", { id: "voter", value: G.voter(), autocomplete: "off", maxlength: 80,
      onkeydown: (event) => event.key === "Enter" && name.blur(), // the keys vote again
      onchange: () => {
        G.setVoter(name.value);
        start();
        G.say(G.voter() ? `Votes are now those of ${G.voter()}.` : "Votes are now without a name.");
      } });
    const choose = (choice, label, props) => G.button(label, () => castVote(choice), { class: "choice", ...props });
    parts = {
      live: G.el("p", { class: "live unseen", role: "status" }),
      progress: G.el("progress", { max: 1, value: 0, "aria-label": "Voted" }),
      count: G.el("span", { id: "progress" }),
      note: G.el("p", { class: "notice warn", hidden: true },
        "This browser does not keep votes: export them before you close the page."),
      prompt: G.el("div", { class: "asked" }),
      result: G.el("div", { id: "result", hidden: true }),
      toResult: G.button("Result", () => G.toggleResult(), { id: "to-result" }),
    };
    parts.choices = G.el("div", { class: "choices", role: "group", "aria-label": "Your vote" },
      choose("left", "Left is better", { "data-key": "1" }), choose("tie", "No difference", { "data-key": "0" }),
      choose("right", "Right is better", { "data-key": "2" }));
    parts.ballot = G.el("div", { id: "ballot" }, parts.prompt, stage.node, parts.choices);
    G.$("vote").replaceChildren(
      G.el("div", { class: "bar" },
        G.el("h2", { id: "vote-title", tabindex: -1, autofocus: true }, "Blind vote"), parts.progress, parts.count,
        G.field("Voter", name),
        G.el("div", { class: "group", role: "group", "aria-label": "Entries" },
          G.button("\u2190", () => G.voteStep(-1), { "aria-label": "Previous entry" }),
          G.button("\u2192", () => G.voteStep(1), { "aria-label": "Next entry" })),
        G.button("Undo", undo, { id: "undo" }), zoom, parts.toResult,
        G.button("Close", G.close, { class: "close" })),
      parts.note, parts.ballot, parts.result, parts.live);
    G.$("vote").addEventListener("cancel", (event) => {
      event.preventDefault();
      G.close();
    });
    G.$("vote").addEventListener("close", ({ target }) => showing && !target.open && G.close()); // closed by the browser
  }

  const chosen = () => new Map(G.votes(G.voter()).map((vote) => [vote.entry, vote]));

  /** Begin, or go on, at the first entry without a vote. */
  function start() {
    plan = G.plan();
    const done = chosen();
    at = Math.max(0, plan.findIndex(({ entry }) => !done.has(entry.id)));
    drawn = null;
    show();
    if (plan.length && done.size >= plan.length) G.toggleResult(true);
  }

  const said = (vote, left) => (!vote ? null : vote.choice === "tie" ? "tie" : vote.choice === left ? "left" : "right");

  function show() {
    const done = chosen();
    parts.progress.max = plan.length || 1;
    parts.progress.value = done.size;
    parts.count.textContent = `${done.size} of ${plan.length}`;
    parts.note.hidden = G.remembers;
    parts.choices.hidden = !plan.length;
    if (!plan.length) {
      parts.prompt.replaceChildren(G.el("p", { class: "empty" }, "No entry has an image of both systems, so there is nothing to vote on."));
      return;
    }
    const { entry, left } = plan[at];
    const mark = said(done.get(entry.id), left);
    [...parts.choices.children].forEach((button, i) =>
      button.setAttribute("aria-pressed", String(["left", "tie", "right"][i] === mark)));
    if (drawn === entry.id) return;
    drawn = entry.id;
    draw(entry, left);
  }

  function draw(entry, left) {
    const [a, b] = G.votePair();
    const sides = left === "a" ? [a, b] : [b, a];
    parts.prompt.replaceChildren(...[...G.promptBox(entry), G.inputBoxes(entry, false)].filter(Boolean));
    stage.setZoom("fit");
    stage.show(sides.map((i, side) => ({ shot: entry.shots[i], label: ["Left", "Right"][side],
      alt: `${["Left", "Right"][side]} image: ${G.cut(entry.prompt, 200)}` })), "side");
    if (plan[at + 1]) G.preload(plan[at + 1].entry, [a, b]);
  }

  function castVote(side) {
    if (!plan.length || !parts.result.hidden) return;
    const { entry, left } = plan[at];
    const right = left === "a" ? "b" : "a";
    G.vote(entry, side === "tie" ? "tie" : side === "left" ? left : right, left);
    const done = chosen();
    const ahead = [...plan.keys()].map((i) => (at + 1 + i) % plan.length).find((i) => !done.has(plan[i].entry.id));
    if (ahead !== undefined) at = ahead;
    show();
    G.say(`${side === "tie" ? "Tie" : side === "left" ? "Left" : "Right"} noted. ${parts.count.textContent}.`);
    if (ahead === undefined) G.toggleResult(true);
  }

  function undo() {
    const id = G.undoVote();
    if (id === null) return G.say("There is no vote to undo.");
    G.toggleResult(false);
    at = Math.max(0, plan.findIndex(({ entry }) => entry.id === id));
    show();
    G.say(`The last vote is undone. ${parts.count.textContent}.`);
  }

  G.voteStep = (by) => {
    if (!plan.length || !parts.result.hidden) return;
    at = Math.min(plan.length - 1, Math.max(0, at + by));
    show();
  };

  G.toggleResult = (on = parts.result.hidden) => {
    parts.result.hidden = !on;
    parts.ballot.hidden = on;
    parts.toResult.textContent = on ? "Back to voting" : "Result";
    if (on) parts.result.replaceChildren(...G.resultParts(plan.length - chosen().size));
    else show();
  };

  /** After votes were imported or cleared. */
  G.votesChanged = () => {
    plan = G.plan();
    at = Math.min(at, Math.max(0, plan.length - 1));
    drawn = null;
    show();
    G.toggleResult(true);
  };

  G.canVote = () => G.pair && G.state.a !== G.state.b && G.entries.length > 0;

  G.renderVote = () => {
    const dialog = G.$("vote");
    const open = G.state.view === "vote";
    if (open && !showing) {
      showing = true;
      if (!stage) build();
      dialog.showModal();
      G.toggleResult(false);
      start();
    } else if (!open && showing) {
      showing = false;
      stage.empty();
      drawn = null;
      dialog.close();
      G.fitList();
    }
  };

  G.voteKeys = {
    1: () => castVote("left"), 2: () => castVote("right"), 0: () => castVote("tie"),
    ArrowLeft: () => G.voteStep(-1), ArrowRight: () => G.voteStep(1),
    u: undo, r: () => G.toggleResult(), z: () => stage.cycleZoom(), p: () => stage.clock.toggle(),
    v: () => G.close(),
  };
}
