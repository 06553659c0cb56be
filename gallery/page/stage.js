"use strict";
// Where images are compared. All panes share one zoom, one place and one clock, so that the eye can stay where it is.
{
  const G = window.Gallery;
  const FLICKER = 700; // ms a side; slow enough to never flash three times a second
  const FAR = 32; // most screen pixels per image pixel
  const clamp = (x, lo, hi) => Math.min(hi, Math.max(lo, x));

  const blank = (label) => {
    const canvas = G.el("div", { class: "canvas" });
    return { canvas, layer: G.el("div", { class: "layer" }, canvas, label ? G.el("span", { class: "plate" }, label) : null) };
  };

  /** An item {shot, label, alt} as a layer; `ready` runs when a video knows its length. */
  function layerOf(item, ready) {
    const media = G.mediaOf(item.shot);
    const { canvas, layer } = blank(item.label);
    const surface = media ? G.surface(media, item.alt, ready) : null;
    canvas.append(surface ? surface.node : G.placeholder(G.whyMissing(item.shot)));
    return { canvas, layer, surface, media };
  }

  class Stage {
    constructor(onzoom = () => undefined) {
      this.zoom = "fit";
      this.pixels = null; // null: as the zoom asks for
      this.split = 50;
      this.front = 0; // what flicker shows
      [this.x, this.y] = [0, 0];
      this.layers = [];
      this.panes = G.el("div", { class: "panes" });
      this.clock = G.createClock();
      this.slider = G.el("input", { type: "range", min: 0, max: 100, step: 1, value: 50, class: "split",
        "aria-label": "Divider: A is left of it, B right of it", oninput: () => this.setSplit(Number(this.slider.value)) });
      this.line = G.el("div", { class: "divider" });
      this.onzoom = onzoom;
      this.node = G.el("div", { class: "stage" }, this.panes, this.slider, this.clock.bar);
      new ResizeObserver(() => this.apply()).observe(this.panes);
      G.watchPointer(this);
    }

    /** Modes: slider and flicker lay the first two items on each other; side and strip stand them side by side. */
    show(items, mode) {
      this.mode = mode;
      this.front = 0;
      this.layers = items.map((item) => layerOf(item, () => this.clock.refresh()));
      const stacked = mode === "slider" || mode === "flicker";
      const layers = this.layers.map(({ layer }) => layer);
      this.panes.className = `panes ${mode}`;
      this.panes.style.setProperty("--panes", stacked ? 1 : items.length);
      this.panes.replaceChildren(...(stacked
        ? [G.el("div", { class: "pane" }, layers, mode === "slider" ? this.line : null)]
        : layers.map((layer) => G.el("div", { class: "pane" }, layer))));
      this.slider.hidden = mode !== "slider";
      const media = this.layers.map((layer) => layer.media).filter(Boolean);
      this.frame = [Math.max(1, ...media.map(({ width }) => width || 512)), Math.max(1, ...media.map(({ height }) => height || 512))];
      if (!media.length) this.frame = [512, 512];
      this.clock.use(this.layers.map(({ surface }) => surface).filter(Boolean));
      this.autoFlicker(this.auto && mode === "flicker");
      this.apply();
    }

    empty() {
      this.autoFlicker(false);
      this.clock.use([]);
      this.layers = [];
      this.panes.replaceChildren();
    }

    size() {
      const pane = this.panes.firstElementChild;
      return pane ? [pane.clientWidth, pane.clientHeight] : [0, 0];
    }

    scale() {
      const [width, height] = this.size();
      return this.zoom === "fit" ? Math.min(width / this.frame[0], height / this.frame[1]) : this.zoom;
    }

    setZoom(zoom) {
      this.zoom = zoom === "fit" ? zoom : clamp(zoom, 0.1, FAR);
      if (zoom === "fit") [this.x, this.y] = [0, 0];
      this.apply();
    }

    /** Zoom so that the point under the pointer, measured from the pane's middle, stays where it is. */
    zoomAt(factor, px, py) {
      const old = this.scale();
      const scale = clamp(old * factor, 0.1, FAR);
      this.x = px - ((px - this.x) * scale) / old;
      this.y = py - ((py - this.y) * scale) / old;
      this.setZoom(scale);
    }

    cycleZoom() {
      const [stops, now] = [["fit", 1, 2], this.zoom];
      this.setZoom(stops[(stops.indexOf(now) + 1) % stops.length]);
    }

    setPixels(on) {
      this.pixels = on;
      this.apply();
    }

    pan(dx, dy) {
      this.x += dx;
      this.y += dy;
      this.apply();
    }

    setSplit(split) {
      this.split = clamp(split, 0, 100);
      this.apply();
    }

    swap() {
      this.front = 1 - this.front;
      this.apply();
    }

    /** Flicker by itself; never for those who ask for less motion. */
    autoFlicker(on) {
      clearInterval(this.timer);
      this.auto = on && !G.calm();
      if (this.auto) this.timer = setInterval(() => this.swap(), FLICKER);
      this.onzoom(this);
    }

    crisp() {
      return this.pixels ?? (this.zoom !== "fit" && this.scale() > 1);
    }

    apply() {
      const [width, height] = this.size();
      if (!width || !this.frame) return;
      const scale = this.scale();
      const [w, h] = this.frame.map((side) => side * scale);
      this.x = clamp(this.x, -Math.max(0, w - width) / 2, Math.max(0, w - width) / 2);
      this.y = clamp(this.y, -Math.max(0, h - height) / 2, Math.max(0, h - height) / 2);
      const [left, top] = [(width - w) / 2 + this.x, (height - h) / 2 + this.y];
      for (const { canvas } of this.layers)
        Object.assign(canvas.style, { width: `${w}px`, height: `${h}px`, transform: `translate(${left}px, ${top}px)` });
      this.panes.classList.toggle("crisp", this.crisp());
      this.panes.classList.toggle("zoomed", this.zoom !== "fit");
      this.seen = [Math.max(0, left), Math.min(width, left + w)]; // what of the image is on screen
      this.applyMode();
      this.onzoom(this);
    }

    applyMode() {
      const cut = this.seen[0] + ((this.seen[1] - this.seen[0]) * this.split) / 100;
      this.slider.value = this.split;
      this.slider.setAttribute("aria-valuetext", `${Math.round(this.split)} % of A`);
      this.line.style.transform = `translateX(${cut}px)`;
      this.layers.forEach(({ layer }, i) => {
        layer.style.clipPath = this.mode !== "slider" ? "" : i ? `inset(0 0 0 ${cut}px)` : `inset(0 calc(100% - ${cut}px) 0 0)`;
        layer.style.visibility = this.mode === "flicker" && i !== this.front ? "hidden" : "";
      });
    }
  }

  /** Drag moves the divider, or the image once it is zoomed; the wheel and two fingers zoom; a click flickers. */
  G.watchPointer = (stage) => {
    const down = new Map();
    let grip = null; // "split" or "pan"
    const { panes } = stage;
    const inPane = (event) => {
      const pane = event.target.closest(".pane") || panes.firstElementChild;
      const box = pane.getBoundingClientRect();
      return { x: event.clientX - box.left, y: event.clientY - box.top, box };
    };
    const setSplit = (event) => {
      const box = panes.firstElementChild.getBoundingClientRect();
      const [lo, hi] = stage.seen;
      stage.setSplit((100 * (event.clientX - box.left - lo)) / Math.max(1, hi - lo));
    };
    const nearLine = (event) => Math.abs(event.clientX - stage.line.getBoundingClientRect().left) < 24;
    const gap = () => {
      const [p, q] = [...down.values()];
      return Math.hypot(p.clientX - q.clientX, p.clientY - q.clientY);
    };
    panes.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !stage.layers.length) return;
      down.set(event.pointerId, event);
      panes.setPointerCapture(event.pointerId);
      if (stage.mode === "flicker" && stage.zoom === "fit") stage.swap();
      grip = stage.mode === "slider" && (stage.zoom === "fit" || nearLine(event)) ? "split" : "pan";
      if (grip === "split") setSplit(event);
    });
    panes.addEventListener("pointermove", (event) => {
      const last = down.get(event.pointerId);
      if (!last) return;
      const wide = down.size === 2 ? gap() : 0;
      down.set(event.pointerId, event);
      const { x, y, box } = inPane(event);
      if (down.size === 2) stage.zoomAt(gap() / Math.max(1, wide), x - box.width / 2, y - box.height / 2);
      else if (grip === "split") setSplit(event);
      else stage.pan(event.clientX - last.clientX, event.clientY - last.clientY);
    });
    for (const end of ["pointerup", "pointercancel"]) panes.addEventListener(end, (event) => down.delete(event.pointerId));
    panes.addEventListener("wheel", (event) => {
      if (!stage.layers.length) return;
      event.preventDefault();
      const { x, y, box } = inPane(event);
      stage.zoomAt(Math.exp(-clamp(event.deltaY, -100, 100) / 300), x - box.width / 2, y - box.height / 2);
    }, { passive: false });
  };

  G.createStage = (onzoom) => new Stage(onzoom);

  /** The zoom buttons of a stage, and what keeps them in step with it. */
  G.zoomBar = () => {
    const bar = G.el("div", { class: "group", role: "group", "aria-label": "Zoom" });
    const how = G.el("output", { class: "soft zoom-now" });
    const buttons = [["Fit", "fit"], ["1\u00d7", 1], ["2\u00d7", 2]].map(([label, zoom]) =>
      [zoom, G.button(label, () => bar.stage.setZoom(zoom))]);
    const pixels = G.button("Pixels", () => bar.stage.setPixels(!bar.stage.crisp()), { title: "Show pixels instead of smoothing" });
    bar.append(...buttons.map(([, button]) => button), pixels, how);
    bar.follow = (stage) => {
      for (const [zoom, button] of buttons) button.setAttribute("aria-pressed", String(stage.zoom === zoom));
      pixels.setAttribute("aria-pressed", String(stage.layers.length > 0 && stage.crisp()));
      how.textContent = stage.layers.length ? `${stage.scale().toFixed(stage.scale() < 10 ? 2 : 0)}\u00d7` : "";
    };
    return bar;
  };
}
