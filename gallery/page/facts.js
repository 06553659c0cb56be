"use strict";
// Everything the manifest knows of one entry, beside the stage.
{
  const G = window.Gallery;

  const title = G.titled;
  const part = (heading, ...children) => G.el("section", {}, G.el("h3", {}, heading), children);

  /** The prompt in full, however long; also used while voting. */
  G.promptBox = (entry) => [
    G.el("div", { class: "prompt scrolls", tabindex: "0", role: "region", "aria-label": "Prompt", dir: "auto" },
      entry.prompt || "(no prompt)"),
    entry.instruction ? G.el("p", { class: "instruction", dir: "auto" }, G.el("strong", {}, "Instruction: "), entry.instruction) : null,
  ].filter(Boolean);

  G.original = (media, label) => {
    const url = G.url(media.original) || G.url(media.shown);
    return url ? G.el("a", { href: url, target: "_blank", rel: "noopener" }, label) : "\u2013";
  };

  /** Source, control and reference, each as a small picture; without a link where names must stay hidden. */
  G.inputBoxes = (entry, linked) => {
    const inputs = Object.entries(entry.inputs || {}).flatMap(([kind, media]) => [media].flat().filter(Boolean).map((one) => [kind, one]));
    if (!inputs.length) return null;
    return G.el("div", { class: "inputs" }, inputs.map(([kind, media]) =>
      G.el("figure", {}, G.thumb({ media }, `${kind} image`),
        G.el("figcaption", {}, kind, linked ? [" ", G.original(media, "original")] : null))));
  };

  function scores(entry, systems) {
    const two = G.pair && systems.length === 2;
    const rows = G.rewards.map((reward) => [
      G.el("span", { title: reward.about || null }, reward.name, " ", G.el("span", { class: `role ${reward.role}` }, reward.role)),
      ...systems.map((i) => G.number(G.score(entry, i, reward.name), reward.decimals)),
      ...(two ? [G.delta(G.gain(entry, reward.name, { a: systems[0], b: systems[1] }), reward.decimals)] : []),
    ]);
    if (!rows.length) return null;
    return G.table("Scores", ["Reward", ...systems.map(title), ...(two ? ["B \u2212 A"] : [])], rows, { class: "scrolls facts-scores" });
  }

  const pairs = (rows) => G.el("dl", {}, rows.filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => [G.el("dt", {}, name), G.el("dd", {}, value)]).flat());

  function checks(shot) {
    if (!(shot.checks || []).length) return null;
    return G.el("ul", { class: "checks" }, shot.checks.map(({ name, passed, note }) =>
      G.el("li", { class: passed ? "up" : "down" },
        G.el("strong", {}, passed ? "\u2713 passed" : "\u2717 failed"), ` ${name}`, note ? G.el("span", { class: "soft" }, ` \u2013 ${note}`) : null)));
  }

  function sparklines(steps) {
    if (!steps || !steps.rewards) return null;
    const series = Array.isArray(steps.rewards) ? [["Reward", steps.rewards]] : Object.entries(steps.rewards);
    return series.filter(([, values]) => Array.isArray(values) && values.length).map(([name, values]) => G.sparkline(name, values));
  }

  function shotFacts(entry, i) {
    const shot = entry.shots[i];
    if (!shot) return part(title(i), G.el("p", { class: "soft" }, G.whyMissing(shot)));
    const media = G.mediaOf(shot);
    return part(title(i), ...[
      media ? null : G.el("p", { class: "soft" }, G.whyMissing(shot)),
      pairs([
        ["Seed", shot.seed ?? entry.seed],
        ["Size", media ? `${media.width} \u00d7 ${media.height}${media.kind === "image" ? "" : `, ${media.kind}`}` : null],
        ["Frames", media && media.frames ? `${media.frames}${media.fps ? ` at ${media.fps} per second` : ""}` : null],
        ["Candidates", shot.candidates],
        ["File", media ? G.original(media, "Open the original") : null],
      ]),
      checks(shot), sparklines(shot.steps),
      shot.command ? [G.el("p", { class: "soft" }, "To make this very image again:"), G.commandBox(shot.command, `Command of ${title(i)}`)] : null,
    ].flat().filter(Boolean));
  }

  /** The same case over training, all systems at the same step. */
  function samples(entry, systems) {
    const having = systems.filter((i) => ((entry.shots[i] || {}).samples || []).length);
    if (!having.length) return null;
    const steps = [...new Set(having.flatMap((i) => entry.shots[i].samples.map(({ step }) => step)))].sort((x, y) => x - y);
    const boxes = G.el("div", { class: "inputs" });
    const now = G.el("output", {});
    const range = G.el("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "Training step", oninput: show });
    function show() {
      const step = steps[range.value];
      now.textContent = `step ${step}`;
      range.setAttribute("aria-valuetext", now.textContent);
      boxes.replaceChildren(...having.map((i) => {
        const sample = entry.shots[i].samples.filter((one) => one.step <= step).sort((x, y) => y.step - x.step)[0];
        const shot = sample || { missing: `No sample up to step ${step}` };
        return G.el("figure", {}, G.thumb(shot, `${title(i)} at step ${step}`), G.el("figcaption", {}, title(i)));
      }));
    }
    show();
    return part("Over training", G.el("div", { class: "scrub" }, range, now), boxes);
  }

  G.facts = (entry, systems) => {
    const inputs = G.inputBoxes(entry, true);
    return [
      G.el("section", {}, G.promptBox(entry),
        entry.tags.length ? G.el("p", { class: "soft" }, `Tags: ${entry.tags.join(", ")}`) : null),
      inputs ? part("Given", inputs) : null,
      scores(entry, systems),
      samples(entry, systems),
      ...systems.map((i) => shotFacts(entry, i)),
    ].filter(Boolean);
  };
}
