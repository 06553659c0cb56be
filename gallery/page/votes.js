"use strict";
// Votes: where they are kept, what a line of them is, how lines merge. The schema is in docs/gallery.md.
{
  const G = window.Gallery;
  const VERSION = 1;
  const votes = new Map(); // voter, entry and systems -> the one vote that counts
  let plans = {};
  let voter = "";
  G.remembers = true; // whether this browser keeps votes after the page is closed

  const key = () => `diffalign-gallery:${G.manifest.id}`;
  const same = (vote) => JSON.stringify([vote.voter, vote.entry, vote.a, vote.b]);

  G.loadVotes = () => {
    try {
      const kept = JSON.parse(localStorage.getItem(key()) || "{}");
      for (const vote of kept.votes || []) if (!G.voteProblem(full(vote))) votes.set(same(vote), vote);
      plans = kept.plans || {};
      voter = String(kept.voter || "");
    } catch {
      G.remembers = false;
    }
  };

  function keep() {
    try {
      localStorage.setItem(key(), JSON.stringify({ votes: [...votes.values()], plans, voter }));
      G.remembers = true;
    } catch {
      G.remembers = false;
    }
  }

  G.voter = () => voter;
  G.setVoter = (name) => {
    voter = name.trim();
    keep();
  };

  /** The two systems of a vote, in the manifest's order, whichever is called A on the page. */
  G.votePair = () => [Math.min(G.state.a, G.state.b), Math.max(G.state.a, G.state.b)];

  const nameOf = (i) => G.systems[i].name;
  const originalOf = (entry, name) => {
    const shot = entry && entry.shots[G.systems.findIndex((system) => system.name === name)];
    return (shot && shot.media && (shot.media.original || shot.media.shown)) || "";
  };

  /** A kept vote as a line of the schema. Prompt and paths are in the manifest, so the browser need not keep them. */
  function full(vote) {
    const entry = G.byId.get(vote.entry);
    return {
      format: "diffalign-votes", version: VERSION, page: G.manifest.id, entry: vote.entry, prompt: entry ? entry.prompt : "",
      a: vote.a, b: vote.b, a_path: originalOf(entry, vote.a), b_path: originalOf(entry, vote.b),
      choice: vote.choice, left: vote.left, blind: vote.blind, voter: vote.voter, at: vote.at,
    };
  }

  /** What is wrong with a line of votes of this page, or null. */
  G.voteProblem = (vote) => {
    if (!G.byId.has(vote.entry)) return `no entry ${JSON.stringify(vote.entry)}`;
    const places = [vote.a, vote.b].map((name) => G.systems.findIndex((system) => system.name === name));
    if (places[0] < 0 || places[1] <= places[0]) return "a and b are not two systems in the manifest's order";
    if (!["a", "b", "tie"].includes(vote.choice)) return `choice is ${JSON.stringify(vote.choice)}`;
    if (!["a", "b"].includes(vote.left)) return `left is ${JSON.stringify(vote.left)}`;
    if (typeof vote.blind !== "boolean") return `blind is ${JSON.stringify(vote.blind)}`;
    if (typeof vote.voter !== "string") return `voter is ${JSON.stringify(vote.voter)}`;
    if (typeof vote.at !== "string" || Number.isNaN(Date.parse(vote.at))) return `at is ${JSON.stringify(vote.at)}`;
    return null;
  };

  /** Adds a vote unless a later one of the same voter stands; says whether it did. */
  function merge(vote) {
    const standing = votes.get(same(vote));
    if (standing && Date.parse(standing.at) >= Date.parse(vote.at)) return false;
    votes.set(same(vote), vote);
    return true;
  }

  G.vote = (entry, choice, left) => {
    const [a, b] = G.votePair().map(nameOf);
    const vote = { entry: entry.id, a, b, choice, left, blind: true, voter, at: new Date().toISOString() };
    votes.set(same(vote), vote);
    keep();
  };

  /** Votes on the pair; of one voter, or of everybody. */
  G.votes = (whose = null) => {
    const [a, b] = G.votePair().map(nameOf);
    return [...votes.values()].filter((vote) => vote.a === a && vote.b === b && (whose === null || vote.voter === whose));
  };

  G.undoVote = () => {
    const mine = G.votes(voter);
    if (!mine.length) return null;
    const last = mine.reduce((x, y) => (Date.parse(y.at) >= Date.parse(x.at) ? y : x));
    votes.delete(same(last));
    keep();
    return last.entry;
  };

  G.clearVotes = () => {
    votes.clear();
    plans = {};
    keep();
  };

  /** Order and sides for this voter and pair, drawn once: half of the entries have `a` on the left. */
  G.plan = () => {
    const pair = G.votePair();
    const name = JSON.stringify([...pair, voter]);
    const able = G.entries.filter((entry) => pair.every((i) => G.mediaOf(entry.shots[i])));
    const known = plans[name];
    if (!known || known.order.length !== able.length) {
      const odd = G.randomBelow(2);
      const sides = G.shuffle(able.map((_, i) => "ab"[(i + odd) % 2]));
      plans[name] = { order: G.shuffle(able.map((entry) => entry.place)), left: sides.join("") };
      keep();
    }
    const { order, left } = plans[name];
    return order.map((place, i) => ({ entry: G.entries[place], left: left[i] }));
  };

  G.exportVotes = () => {
    const text = [...votes.values()].map((vote) => `${JSON.stringify(full(vote))}\n`).join("");
    const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
    const who = voter.replace(/[^\w-]+/g, "-") || "votes";
    G.el("a", { href: url, download: `${who}-${String(G.manifest.id).slice(0, 8)}.jsonl` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    return votes.size;
  };

  function readLine(line, tally) {
    let vote;
    try {
      vote = JSON.parse(line);
    } catch {
      return "not JSON";
    }
    if (!vote || vote.format !== "diffalign-votes") return "not a vote";
    if (!(vote.version <= VERSION)) return `version ${vote.version} is newer than this page`;
    if (vote.page !== G.manifest.id) {
      tally.foreign++;
      return null;
    }
    const problem = G.voteProblem(vote);
    if (problem) return problem;
    const { entry, a, b, choice, left, blind, voter, at } = vote;
    tally[merge({ entry, a, b, choice, left, blind, voter, at }) ? "added" : "older"]++;
    return null;
  }

  /** Merge the lines of one file: how many were added, older, of other pages, and which were bad. */
  G.importVotes = (text) => {
    const tally = { added: 0, older: 0, foreign: 0, bad: [] };
    text.split(/\r?\n/).forEach((line, i) => {
      const problem = line.trim() ? readLine(line, tally) : null;
      if (problem) tally.bad.push(`line ${i + 1}: ${problem}`);
    });
    keep();
    return tally;
  };
}
