"use strict";
// Line charts and sparklines as plain SVG.
{
  const G = window.Gallery;
  const BOX = { width: 520, height: 280, left: 62, right: 14, top: 14, bottom: 46 };
  const DASHES = ["none", "7 4", "2 3", "9 3 2 3", "12 5"];

  /** About `most` round numbers that reach from lo or below to hi or above. */
  function ticks([lo, hi], most) {
    const raw = (hi - lo) / most;
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((k) => k * unit >= raw) * unit;
    const [first, last] = [Math.floor(lo / step + 1e-9), Math.ceil(hi / step - 1e-9)];
    return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
  }

  function span(values) {
    if (!values.length) return [0, 1];
    const [lo, hi] = [values.reduce((x, y) => Math.min(x, y)), values.reduce((x, y) => Math.max(x, y))];
    return lo < hi ? [lo, hi] : [lo - 0.5, hi + 0.5];
  }

  /** A path through the valid points; an invalid one breaks the line. */
  function path(points) {
    let pen = "M";
    return points.map(([x, y]) => {
      if (!Number.isFinite(x) || !Number.isFinite(y)) {
        pen = "M";
        return "";
      }
      const piece = `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
      return piece;
    }).join("");
  }

  const points = (series) => (series.x || []).map((x, i) => [x, (series.y || [])[i]])
    .map(([x, y]) => (G.isNumber(x) && G.isNumber(y) ? [x, y] : [NaN, NaN]));

  function axes(curve, xs, ys, px, py) {
    const { width, height, left, right, top, bottom } = BOX;
    const text = (props, label) => G.svg("text", props, label);
    const base = height - bottom;
    return [
      ys.map((y) => G.svg("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) })),
      ys.map((y) => text({ x: left - 8, y: py(y) + 4, "text-anchor": "end" }, G.amount(y))),
      xs.map((x) => text({ x: px(x), y: base + 18, "text-anchor": "middle" }, G.amount(x))),
      text({ x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, curve.x || "step"),
      text({ transform: `translate(14 ${(top + base) / 2}) rotate(-90)`, "text-anchor": "middle" }, curve.y || ""),
    ].flat();
  }

  function plot(curve) {
    const all = curve.series.flatMap(points).filter(([x]) => Number.isFinite(x));
    const xs = ticks(span(all.map(([x]) => x)), 6);
    const ys = ticks(span(all.map(([, y]) => y)), 5);
    const [x0, x1, y0, y1] = [xs[0], xs.at(-1), ys[0], ys.at(-1)];
    const { width, height, left, right, top, bottom } = BOX;
    const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const py = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
    const lines = curve.series.map((series, i) => G.svg("path", {
      class: `line hue${i % 5}`, "stroke-dasharray": DASHES[i % 5], d: path(points(series).map(([x, y]) => [px(x), py(y)])),
    }));
    const label = `${curve.name}: ${curve.y} over ${curve.x}. ` +
      curve.series.map((series) => `${series.name} ${story(series.y)}`).join("; ");
    return G.svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
      axes(curve, xs, ys, px, py), lines);
  }

  function story(values) {
    const valid = (values || []).filter(G.isNumber);
    if (!valid.length) return "has no valid value";
    const best = valid.reduce((x, y) => Math.max(x, y));
    return `from ${G.amount(valid[0])} to ${G.amount(valid.at(-1))}, highest ${G.amount(best)}`;
  }

  const legend = (series) => G.el("ul", { class: "legend" }, series.map(({ name }, i) =>
    G.el("li", {},
      G.svg("svg", { viewBox: "0 0 28 8", "aria-hidden": "true" },
        G.svg("path", { class: `line hue${i % 5}`, "stroke-dasharray": DASHES[i % 5], d: "M0 4L28 4" })),
      name)));

  function asTable(curve) {
    const xs = [...new Set(curve.series.flatMap((series) => series.x || []))].sort((p, q) => p - q);
    const at = (series, x) => (series.y || [])[(series.x || []).indexOf(x)];
    const rows = xs.map((x) => [G.amount(x), ...curve.series.map((series) => G.amount(at(series, x)))]);
    return G.el("details", {}, G.el("summary", {}, "As a table"),
      G.table(curve.name, [curve.x || "step", ...curve.series.map((series) => series.name)], rows));
  }

  G.chart = (curve) =>
    G.el("figure", { class: "chart" }, G.el("figcaption", {}, curve.name), plot(curve), legend(curve.series), asTable(curve));

  /** Rewards over the steps of one image, small. */
  G.sparkline = (name, values) => {
    const [lo, hi] = span(values.filter(G.isNumber));
    const last = Math.max(1, values.length - 1);
    const at = (value, i) => [4 + (i / last) * 212, G.isNumber(value) ? 40 - ((value - lo) / (hi - lo)) * 36 : NaN];
    const label = `${name} over ${G.count(values.length, "step")}: ${story(values)}`;
    const spots = values.map(at);
    const end = spots.findLast(([, y]) => Number.isFinite(y));
    return G.el("figure", { class: "spark" },
      G.svg("svg", { viewBox: "0 0 220 44", role: "img", "aria-label": label },
        G.svg("path", { class: "line hue0", d: path(spots) }),
        end ? G.svg("circle", { class: "dot", cx: end[0], cy: end[1], r: 3 }) : null),
      G.el("figcaption", {}, label));
  };

  G.renderCurves = () => {
    const curves = (G.manifest.curves || []).filter((curve) => Array.isArray(curve.series) && curve.series.length);
    G.$("curves").hidden = !curves.length;
    if (curves.length) G.$("curves").replaceChildren(
      G.el("h2", {}, "Over training or search"), G.el("div", { class: "charts" }, curves.map(G.chart)));
  };
}
