"use strict";
// The pair in numbers, all systems in numbers, and the best beside the worst.
{
  const G = window.Gallery;
  const SHOWN = 8;

  const named = (reward) => [reward.name, " ", G.el("span", { class: `role ${reward.role}` }, reward.role)];
  const between = (lo, hi, show) => (G.isNumber(lo) && G.isNumber(hi) ? ` [${show(lo)}, ${show(hi)}]` : "");

  /** The largest loss and the largest gain of B: a mean can hide one picture that went wrong. */
  function span(reward) {
    const gains = G.entries.map((entry) => G.gain(entry, reward.name)).filter(G.isNumber);
    const [least, most] = gains.reduce(([lo, hi], gain) => [Math.min(lo, gain), Math.max(hi, gain)], [Infinity, -Infinity]);
    return gains.length ? `${G.signed(least, reward.decimals)} to ${G.signed(most, reward.decimals)}` : "\u2013";
  }

  G.pairTable = () => {
    const { a, b } = G.state;
    const summary = a === b ? null : G.summary(a, b);
    if (!summary)
      return G.el("p", { class: "notice" }, a === b
        ? "A and B are the same system; choose two to compare."
        : "The manifest holds no summary of these two systems.");
    const rows = G.rewards.filter(({ name }) => summary[name]).map((reward) => {
      const row = summary[reward.name];
      const show = (value) => G.signed(value, reward.decimals);
      return [
        named(reward), [G.delta(row.delta, reward.decimals, row.lo <= 0 && row.hi >= 0), between(row.lo, row.hi, show)],
        `${row.wins} / ${row.losses} / ${row.ties}`, span(reward),
        G.percent(row.win_rate) + between(row.win_lo, row.win_hi, (x) => (100 * x).toFixed(1)),
        G.pValue(row.sign_p), String(row.n),
      ];
    });
    return G.table(`B, ${G.systems[b].name}, against A, ${G.systems[a].name}`,
      ["Reward", "Mean of B \u2212 A [95 %]", "B wins / loses / ties", "Worst to best", "Win rate of B [95 %]", "Sign test p", "n"],
      rows, { id: "pair-table" });
  };

  function meanCell(i, reward) {
    const { n, mean } = G.mean(i, reward.name);
    return G.number(mean, reward.decimals) + (n < G.entries.length ? ` (n ${n})` : "");
  }

  /** Rewards, diversity and cost in one row per system: none of them should be read alone. */
  G.systemTable = () => {
    const costs = [...new Set(G.systems.flatMap((system) => Object.keys(system.cost || {})))];
    const diverse = G.systems.some((system) => G.isNumber(system.diversity));
    const head = ["System", ...G.rewards.map(named), ...(diverse ? ["Diversity"] : []), ...costs.map((cost) => `${cost} per prompt`)];
    if (head.length === 1) return null;
    const rows = G.systems.map((system, i) => [
      G.titled(i),
      ...G.rewards.map((reward) => meanCell(i, reward)),
      ...(diverse ? [G.amount(system.diversity)] : []),
      ...costs.map((cost) => G.amount((system.cost || {})[cost])),
    ]);
    return G.table("Means, diversity and cost of each system", head, rows, { id: "system-table" });
  };

  function reelItem(entry) {
    const { a, b, reward } = G.state;
    return G.el("li", {}, G.el("a", { href: G.link({ entry: entry.id, mode: "side" }) },
      G.el("span", { class: "duo" }, G.shotBox(entry, a, "A", ""), G.shotBox(entry, b, "B", "")),
      G.delta(G.gain(entry, reward), G.reward(reward).decimals),
      G.el("span", { class: "strip-prompt", dir: "auto" }, G.cut(entry.prompt, 160) || "(no prompt)")));
  }

  function reel(id, title, way, empty) {
    const entries = G.extremes(way, SHOWN);
    return G.el("div", { class: "reel", id },
      G.el("h2", {}, title, " ", G.el("span", { class: "soft" }, `by ${G.state.reward}`)),
      entries.length ? G.el("ol", {}, entries.map(reelItem)) : G.el("p", { class: "empty" }, empty));
  }

  G.renderStrips = () => {
    const { a, b, reward } = G.state;
    const show = G.pair && a !== b && reward !== null && G.entries.length > 0;
    G.$("strips").hidden = !show;
    if (show) G.$("strips").replaceChildren(
      reel("wins", "Best wins of B", 1, "B gains on no entry."),
      reel("losses", "Worst regressions of B", -1, "B loses on no entry."));
  };
}
