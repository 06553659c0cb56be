"use strict";
// One medium as an element: a thumbnail, or a surface of the stage that can be set to a frame.
{
  const G = window.Gallery;

  G.mediaOf = (shot) => (shot && shot.media && G.url(shot.media.shown) ? shot.media : null);

  G.whyMissing = (shot) => {
    if (!shot) return "No image of this system";
    if (shot.media) return "The path of this image leaves the gallery\u2019s folder";
    return shot.missing || "No image";
  };

  G.placeholder = (why) => G.el("span", { class: "missing", role: "img", "aria-label": why }, why);

  const lost = (node, media) =>
    node.replaceWith(G.placeholder(`This ${media.kind || "image"} could not be read: ${media.shown}`));

  function image(media, alt, props) {
    const node = G.el("img", { alt, decoding: "async", draggable: "false", ...props });
    node.addEventListener("error", () => lost(node, media));
    node.src = G.url(media.shown);
    return node;
  }

  function video(media, alt, props) {
    const node = G.el("video", { "aria-label": alt, muted: true, playsinline: true, loop: true, ...props });
    node.muted = true;
    node.addEventListener("error", () => lost(node, media));
    node.src = G.url(media.shown);
    return node;
  }

  /** How many frames of a film stand beside each other on its picture. */
  G.columnsOf = (media) => Math.max(1, media.columns || media.frames || 1);

  /** A lazy thumbnail; of a film its first frame, cut out by a box of one frame's shape. */
  G.thumb = (shot, alt) => {
    const media = G.mediaOf(shot);
    if (!media) return G.el("span", { class: "thumb" }, G.placeholder(G.whyMissing(shot)));
    const node = media.kind === "video"
      ? video(media, alt, { preload: "metadata" })
      : image(media, alt, { loading: "lazy" });
    if (media.kind !== "film") return G.el("span", { class: "thumb" }, node);
    const frame = G.el("span", { class: "frame", style: { aspectRatio: `${media.width} / ${media.height}` } }, node);
    const tall = media.height > media.width;
    Object.assign(frame.style, tall ? { height: "100%" } : { width: "100%" });
    const columns = G.columnsOf(media);
    const rows = Math.ceil((media.frames || 1) / columns);
    Object.assign(node.style, { width: `${100 * columns}%`, height: `${100 * rows}%` }); // the box shows the first
    return G.el("span", { class: "thumb" }, frame,
      G.el("span", { class: "badge" }, G.count(media.frames || 1, "frame")));
  };

  /** A thumbnail with the letter of its side, if it has one. */
  G.shotBox = (entry, system, letter, alt) =>
    G.el("span", { class: "shot" }, G.thumb(entry.shots[system], alt),
      letter ? G.el("span", { class: "letter", "aria-hidden": "true" }, letter) : null);

  function filmSurface(media, alt) {
    const node = G.el("canvas", { role: "img", "aria-label": alt });
    const strip = new Image();
    const frames = Math.max(1, media.frames || 1);
    const columns = G.columnsOf(media);
    let current = 0;
    const seek = (frame) => {
      current = Math.min(frame, frames - 1);
      if (!strip.naturalWidth) return;
      const [left, top] = [(current % columns) * node.width, Math.floor(current / columns) * node.height];
      node.getContext("2d").drawImage(strip, left, top, node.width, node.height, 0, 0, node.width, node.height);
      node.dataset.frame = current;
    };
    strip.onload = () => {
      node.width = Math.round(strip.naturalWidth / columns);
      node.height = Math.round(strip.naturalHeight / Math.ceil(frames / columns));
      seek(current);
    };
    strip.onerror = () => lost(node, media);
    strip.src = G.url(media.shown);
    return { node, frames, fps: media.fps || 8, seek };
  }

  function videoSurface(media, alt, ready) {
    const node = video(media, alt, { preload: "auto" });
    const surface = { node, frames: media.frames || 1, fps: media.fps || 24 };
    surface.seek = (frame, playing) => {
      const wanted = (frame + 0.5) / surface.fps;
      // While both play on their own clock only a real drift is worth a seek, which stutters.
      if (!playing || Math.abs(node.currentTime - wanted) > 0.15) node.currentTime = wanted;
    };
    // A browser may refuse to play unasked; the scrubber still works then.
    surface.run = (on) => (on ? node.play().catch(() => undefined) : node.pause());
    node.addEventListener("loadedmetadata", () => {
      if (!media.frames && Number.isFinite(node.duration)) surface.frames = Math.max(1, Math.round(node.duration * surface.fps));
      node.controls = surface.frames === 1; // a stream of unknown length has no common scrubber
      ready();
    });
    return surface;
  }

  /** {node, frames, fps, seek}; `ready` is called when a video has told its length. */
  G.surface = (media, alt, ready) => {
    if (media.kind === "film") return filmSurface(media, alt);
    if (media.kind === "video") return videoSurface(media, alt, ready);
    return { node: image(media, alt), frames: 1, fps: 1, seek: () => undefined };
  };

  /** Have the next pictures read before they are asked for. */
  G.preload = (entry, systems) => {
    for (const i of entry ? systems : []) {
      const media = G.mediaOf(entry.shots[i]);
      if (media && media.kind !== "video") new Image().src = G.url(media.shown);
    }
  };
}
