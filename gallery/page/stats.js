"use strict";
// Wilson's interval and the sign test, as in diffalign/intervals.py.
{
  const G = window.Gallery;
  const Z = 1.959963984540054; // 97.5 % of the normal

  G.wilson = (hits, n) => {
    if (n === 0) return { share: null, lo: 0, hi: 1 };
    const share = hits / n;
    const grown = 1 + (Z * Z) / n;
    const middle = (share + (Z * Z) / (2 * n)) / grown;
    const half = (Z / grown) * Math.sqrt((share * (1 - share)) / n + (Z * Z) / (4 * n * n));
    return { share, lo: Math.max(0, middle - half), hi: Math.min(1, middle + half) };
  };

  // Two-sided, exact. Terms are summed as logarithms: 2^-n underflows beyond a thousand votes.
  G.signTest = (wins, losses) => {
    const n = wins + losses;
    let log = -n * Math.LN2;
    let tail = 0;
    for (let k = 0; k <= Math.min(wins, losses); k++) {
      tail += Math.exp(log);
      log += Math.log((n - k) / (k + 1));
    }
    return Math.min(1, 2 * tail);
  };

  // Numbers in [0, n) without bias: what falls beyond the last whole multiple of n is drawn again.
  G.randomBelow = (n) => {
    const word = new Uint32Array(1);
    const limit = 2 ** 32 - (2 ** 32 % n);
    do crypto.getRandomValues(word); while (word[0] >= limit);
    return word[0] % n;
  };

  G.shuffle = (items) => {
    const out = [...items];
    for (let i = out.length - 1; i > 0; i--) {
      const j = G.randomBelow(i + 1);
      [out[i], out[j]] = [out[j], out[i]];
    }
    return out;
  };
}
