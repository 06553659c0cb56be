"use strict";
// What the manifest says about a pair of systems: deltas, outcomes, order. No element is touched here.
{
  const G = window.Gallery;
  const VERSION = 1;
  const list = (value) => (Array.isArray(value) ? value : []);

  G.state = { a: 0, b: 0, reward: null, entry: null, mode: "slider", view: null, q: "", tag: "", outcome: "all", sort: "order" };

  /** Why this manifest cannot be shown, or null. */
  G.problem = (manifest) => {
    if (manifest === undefined)
      return "The data of this page is missing: manifest.js is not beside index.html, or it is cut short. " +
        "Copy the whole folder, or write it again with diffalign gallery.";
    if (manifest === null || manifest.format !== "diffalign-gallery")
      return "manifest.js does not hold a gallery: its format is not \u201cdiffalign-gallery\u201d.";
    if (!(manifest.version <= VERSION))
      return `This gallery is of version ${manifest.version}, and this page reads up to version ${VERSION}. ` +
        "Write the page again with the diffalign that made the data.";
    if (!list(manifest.systems).length) return "This gallery names no system, so there is nothing to show.";
    return null;
  };

  G.prepare = (manifest) => {
    G.manifest = manifest;
    G.systems = manifest.systems;
    G.rewards = list(manifest.rewards);
    G.entries = list(manifest.entries);
    G.pair = G.systems.length > 1;
    G.byId = new Map(G.entries.map((entry) => [entry.id, entry]));
    G.entries.forEach((entry, place) => {
      entry.place = place;
      entry.prompt = String(entry.prompt ?? "");
      entry.tags = list(entry.tags);
      entry.shots = G.systems.map((_, i) => list(entry.shots)[i] || null);
    });
    const role = (name) => G.rewards.find((reward) => reward.role === name);
    const lead = role("truth") || role("heldout") || role("proxy") || G.rewards[0];
    G.state.reward = lead ? lead.name : null;
    G.state.b = G.pair ? 1 : 0;
    for (const reward of G.rewards) reward.decimals = decimals(reward.name);
  };

  function decimals(name) {
    let most = 0;
    for (const entry of G.entries)
      for (let i = 0; i < G.systems.length; i++) most = Math.max(most, Math.abs(G.score(entry, i, name) ?? 0));
    return most < 10 ? 3 : most < 100 ? 2 : most < 1000 ? 1 : 0;
  }

  /** A system's name behind the letter of its side. */
  G.titled = (i) => {
    const letter = !G.pair ? "" : i === G.state.a ? "A \u00b7 " : i === G.state.b ? "B \u00b7 " : "";
    return letter + G.systems[i].name;
  };

  G.reward = (name) => G.rewards.find((reward) => reward.name === name);

  G.score = (entry, system, name) => {
    const shot = entry.shots[system];
    const value = shot && shot.scores ? shot.scores[name] : null;
    return G.isNumber(value) ? value : null;
  };

  /** B minus A; null where either has no score. */
  G.gain = (entry, name, { a, b } = G.state) => {
    const [before, after] = [G.score(entry, a, name), G.score(entry, b, name)];
    return before === null || after === null ? null : after - before;
  };

  // With one system there is nothing to subtract: sorting then goes by its own score.
  const worth = (entry, name) => (G.pair ? G.gain(entry, name) : G.score(entry, G.state.a, name));

  G.tags = () => {
    const counts = new Map();
    for (const entry of G.entries) for (const tag of new Set(entry.tags)) counts.set(tag, (counts.get(tag) || 0) + 1);
    return [...counts].sort(([x], [y]) => (x < y ? -1 : 1));
  };

  // Parts belong to another reward, so they cannot disagree with it.
  const voices = () => G.rewards.filter((reward) => reward.role !== "part");

  /** How strongly rewards contradict each other on an entry, in units of their usual gain; 0 where they agree. */
  function conflicts() {
    const usual = new Map(voices().map(({ name }) => {
      const gains = G.entries.map((entry) => G.gain(entry, name)).filter((gain) => gain !== null);
      return [name, Math.sqrt(gains.reduce((sum, gain) => sum + gain * gain, 0) / (gains.length || 1)) || 1];
    }));
    return (entry) => {
      const gains = voices().map(({ name }) => (G.gain(entry, name) ?? 0) / usual.get(name));
      return Math.max(0, Math.min(Math.max(...gains), -Math.min(...gains)));
    };
  }

  function outcomeIs(wanted, conflict) {
    const { reward } = G.state;
    return (entry) => {
      if (wanted === "disagree") return conflict(entry) > 0;
      const gain = G.gain(entry, reward);
      if (gain === null) return false;
      return wanted === "win" ? gain > 0 : wanted === "loss" ? gain < 0 : gain === 0;
    };
  }

  function order(sort, conflict) {
    if (sort === "prompt") return (x, y) => x.prompt.localeCompare(y.prompt) || x.place - y.place;
    if (sort === "disagree") return falling(conflict, -1);
    const [way, name] = [sort.slice(0, 2), sort.slice(3)];
    if (way === "up" || way === "dn") return falling((entry) => worth(entry, name), way === "up" ? 1 : -1);
    return (x, y) => x.place - y.place;
  }

  function falling(key, way) {
    return (x, y) => {
      const [p, q] = [key(x), key(y)];
      if (p === null || q === null) return (p === null) - (q === null) || x.place - y.place; // the unscored go last
      return way * (p - q) || x.place - y.place;
    };
  }

  /** The entries that search and filters leave, in the chosen order. */
  G.chosen = () => {
    const { q, tag, outcome, sort } = G.state;
    const needle = q.trim().toLowerCase();
    const conflict = outcome === "disagree" || sort === "disagree" ? conflicts() : null;
    const keeps = [];
    if (needle) keeps.push((entry) => entry.prompt.toLowerCase().includes(needle));
    if (tag) keeps.push((entry) => entry.tags.includes(tag));
    if (outcome !== "all" && G.pair) keeps.push(outcomeIs(outcome, conflict));
    return G.entries.filter((entry) => keeps.every((keep) => keep(entry))).sort(order(sort, conflict));
  };

  /** The `most` entries that gain (way 1) or lose (way -1) most by the chosen reward. */
  G.extremes = (way, most) =>
    G.entries.filter((entry) => way * (G.gain(entry, G.state.reward) ?? 0) > 0)
      .sort(falling((entry) => G.gain(entry, G.state.reward), -way))
      .slice(0, most);

  /** Rewards of a pair, turned round where the manifest has it the other way. */
  G.summary = (a, b) => {
    const found = list(G.manifest.summaries).find((s) => (s.a === a && s.b === b) || (s.a === b && s.b === a));
    if (!found) return null;
    return found.a === a ? found.rewards : Object.fromEntries(
      Object.entries(found.rewards).map(([name, row]) => [name, turned(row)]));
  };

  const minus = (value) => (G.isNumber(value) ? 0 - value : null);
  const rest = (value) => (G.isNumber(value) ? 1 - value : null);

  function turned(row) {
    return {
      ...row, delta: minus(row.delta), lo: minus(row.hi), hi: minus(row.lo), wins: row.losses, losses: row.wins,
      win_rate: rest(row.win_rate), win_lo: rest(row.win_hi), win_hi: rest(row.win_lo),
    };
  }

  /** A system's mean by a reward, over the entries where it is valid. */
  G.mean = (system, name) => {
    const scores = G.entries.map((entry) => G.score(entry, system, name)).filter((score) => score !== null);
    return { n: scores.length, mean: scores.length ? scores.reduce((x, y) => x + y, 0) / scores.length : null };
  };
}
