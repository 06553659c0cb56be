"use strict";
// What the votes say, and whether the rewards say the same.
{
  const G = window.Gallery;

  const interval = ({ share, lo, hi }) =>
    share === null ? "no decided vote" : `${G.percent(share)} [${(100 * lo).toFixed(1)}, ${(100 * hi).toFixed(1)}]`;

  /** Votes, and how often each reward's sign is theirs. Rewards see no ties: a decided vote and a gain of zero say nothing. */
  G.tally = (votes) => {
    const pair = G.votePair();
    const count = (choice) => votes.filter((vote) => vote.choice === choice).length;
    const [a, b, ties] = ["a", "b", "tie"].map(count);
    const rewards = G.rewards.map(({ name, role }) => {
      const signs = votes.filter((vote) => vote.choice !== "tie")
        .map((vote) => (G.gain(G.byId.get(vote.entry), name, { a: pair[0], b: pair[1] }) ?? 0) * (vote.choice === "b" ? 1 : -1))
        .filter((sign) => sign !== 0);
      return { name, role, n: signs.length, ...G.wilson(signs.filter((sign) => sign > 0).length, signs.length) };
    });
    return { a, b, ties, ...G.wilson(b, a + b), p: a + b ? G.signTest(b, a) : null, rewards };
  };

  function numbers(tally, names) {
    return G.table("Votes", ["Of this pair", "Value"], [
      [`Votes for ${names[0]} (a)`, String(tally.a)],
      [`Votes for ${names[1]} (b)`, String(tally.b)],
      ["Ties", String(tally.ties)],
      [`Share of ${names[1]} without ties [95 %, Wilson]`, interval(tally)],
      ["Sign test p, two-sided, without ties", G.pValue(tally.p)],
    ], { id: "vote-table" });
  }

  const agreement = (tally) => G.table("Agreement of the rewards with the votes",
    ["Reward", "Same sign as the vote [95 %, Wilson]", "n"],
    tally.rewards.map((row) => [
      [row.name, " ", G.el("span", { class: `role ${row.role}` }, row.role)], interval(row), String(row.n)]), { id: "agreement" });

  const summed = (tallies) => {
    const sum = (name) => tallies.reduce((total, tally) => total + tally[name], 0);
    const bad = tallies.flatMap((tally) => tally.bad);
    return [`${G.count(sum("added"), "vote")} taken`,
      sum("older") ? `${sum("older")} already known or replaced by a later one` : "",
      sum("foreign") ? `${sum("foreign")} of other pages left out` : "",
      bad.length ? `${G.count(bad.length, "line")} not readable (${bad.slice(0, 3).join("; ")}${bad.length > 3 ? "; \u2026" : ""})` : "",
    ].filter(Boolean).join("; ") + ".";
  };

  let notice = ""; // outlives the redrawing that an import causes

  async function take(files) {
    const texts = await Promise.all([...files].map((file) => file.text()));
    notice = summed(texts.map(G.importVotes));
    G.votesChanged();
    G.say(notice);
  }

  function clear() {
    if (!confirm("Delete all votes of this page from this browser? Exported files stay.")) return;
    G.clearVotes();
    notice = "All votes of this page are deleted.";
    G.votesChanged();
    G.say(notice);
  }

  function tools() {
    const files = G.el("input", { type: "file", id: "import", multiple: true, accept: ".jsonl,.json,.txt",
      onchange: () => take(files.files) });
    return G.el("div", { class: "tools" },
      G.button("Export votes", () => G.say(`${G.count(G.exportVotes(), "vote")} exported.`), { id: "export", class: "strong" }),
      G.field("Import votes (JSONL)", files),
      G.button("Delete all votes", clear, { id: "clear" }));
  }

  G.resultParts = (left) => {
    const all = G.votes();
    const blind = all.filter((vote) => vote.blind);
    const names = G.votePair().map((i) => G.systems[i].name);
    const voters = new Set(blind.map((vote) => vote.voter));
    const tally = G.tally(blind);
    const said = notice;
    notice = "";
    return [
      G.el("h3", {}, `${names[1]} against ${names[0]}`),
      left > 0 ? G.el("p", { class: "notice warn" },
        `${G.count(left, "entry", "entries")} still without your vote; having seen this result may colour them.`) : null,
      said ? G.el("p", { class: "notice", id: "import-note" }, said) : null,
      G.el("p", { class: "soft" }, blind.length ? `${G.count(blind.length, "blind vote")} of ${G.count(voters.size, "voter")}.` : "No blind vote yet.",
        all.length > blind.length ? ` ${G.count(all.length - blind.length, "vote")} with names in sight left out.` : "",
        voters.size > 1 ? " Votes on the same entry count apart, so the interval is narrower than the entries alone would make it." : ""),
      numbers(tally, names),
      G.rewards.length ? agreement(tally) : null,
      tools(),
    ].filter(Boolean);
  };
}
