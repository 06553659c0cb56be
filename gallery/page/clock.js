"use strict";
// One clock for all films and videos on a stage: they show the same frame, whichever is played or scrubbed.
{
  const G = window.Gallery;

  class Clock {
    constructor() {
      this.surfaces = [];
      this.playing = false;
      this.position = 0; // in frames, with a fraction
      this.button = G.button("Play", () => this.toggle(), { class: "play" });
      this.scrubber = G.el("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Frame",
        oninput: () => {
          this.position = Number(this.scrubber.value);
          this.run(false);
        } });
      this.count = G.el("output", {});
      this.bar = G.el("div", { class: "clock", hidden: true }, this.button, this.scrubber, this.count);
    }

    frames() {
      return Math.max(1, ...this.surfaces.map((surface) => surface.frames));
    }

    paint() {
      const frame = Math.floor(this.position);
      for (const surface of this.surfaces) surface.seek(Math.min(frame, surface.frames - 1), this.playing);
      this.scrubber.value = frame;
      this.scrubber.setAttribute("aria-valuetext", `frame ${frame + 1} of ${this.frames()}`);
      this.count.textContent = `${frame + 1} / ${this.frames()}`;
    }

    tick(now) {
      if (!this.playing) return;
      const { fps } = this.surfaces.find((surface) => surface.frames > 1);
      const frame = Math.floor(this.position);
      this.position = (this.position + (Math.max(0, now - this.before) / 1000) * fps) % this.frames();
      this.before = now;
      if (Math.floor(this.position) !== frame) this.paint();
      this.ticket = requestAnimationFrame((next) => this.tick(next));
    }

    run(on) {
      this.playing = on && this.frames() > 1;
      this.button.textContent = this.playing ? "Pause" : "Play";
      for (const surface of this.surfaces) if (surface.run) surface.run(this.playing);
      cancelAnimationFrame(this.ticket);
      this.before = performance.now();
      if (this.playing) this.ticket = requestAnimationFrame((now) => this.tick(now));
      else this.paint();
    }

    toggle() {
      this.run(!this.playing);
    }

    /** After the surfaces, or what is known of their length, changed: play, unless less motion is asked for. */
    refresh() {
      this.scrubber.max = this.frames() - 1;
      this.bar.hidden = this.frames() < 2;
      this.run(!G.calm());
    }

    use(surfaces) {
      for (const surface of this.surfaces) if (surface.run) surface.run(false);
      this.surfaces = surfaces;
      this.position = 0;
      this.refresh();
    }
  }

  G.createClock = () => new Clock();
}
