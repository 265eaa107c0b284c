// Two-dimensional map of the keys on a canvas: hover, or go from key to key with the arrow keys.

import { plural } from "./dom.js";

const NEAR = 14; // px at which a key is pointed at
const ARROWS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const dark = matchMedia("(prefers-color-scheme: dark)");

/** A hue of its own for each class, neighbouring ids far apart. */
export const colour = (classId) => `oklch(${dark.matches ? 0.76 : 0.58} 0.15 ${(classId * 137.508 + 20) % 360})`;

export class KeyMap {
  #canvas;
  #map = null;
  #chosen = -1;
  #classId = null;
  #scale = 1;
  #centre = [0, 0]; // of what is seen, in the map's own coordinates
  #onChoose;

  /** `onChoose(keyId)` is called as keys are pointed at. */
  constructor(canvas, onChoose) {
    this.#canvas = canvas;
    this.#onChoose = onChoose;
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerdown", (event) => this.#point(event));
    canvas.addEventListener("dblclick", () => this.zoom(0));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.#chosen < 0 && this.#choose(0));
    dark.addEventListener("change", () => this.#draw());
    new ResizeObserver(() => this.#draw()).observe(canvas);
  }

  show(map) {
    this.#map = map;
    this.#chosen = -1;
    this.zoom(0);
    this.#canvas.setAttribute("aria-label", `Map of ${plural(map.key_ids.length, "photograph")}, coloured by class`);
    this.#draw();
  }

  /** Let one class stand out (null: none). */
  highlight(classId) {
    this.#classId = classId;
    this.#draw();
  }

  /** Closer by a factor, about the chosen key or a place; 0 shows the whole. */
  zoom(by, about = null) {
    if (!this.#map) return;
    const [x, y] = about ?? (this.#chosen < 0 ? this.#centre : [this.#map.x[this.#chosen], this.#map.y[this.#chosen]]);
    const scale = by ? Math.min(64, Math.max(1, this.#scale * by)) : 1;
    const keep = about ? this.#scale / scale : 0; // what is pointed at stays under the pointer
    const limit = 1 - 1 / scale;
    const within = (value) => Math.min(limit, Math.max(-limit, value));
    this.#centre = [within(x + (this.#centre[0] - x) * keep), within(y + (this.#centre[1] - y) * keep)];
    this.#scale = scale;
    this.#canvas.dataset.scale = scale;
    this.#draw();
  }

  #wheel(event) {
    if (!this.#map) return;
    const by = event.deltaY < 0 ? 1.25 : 0.8;
    if (by < 1 && this.#scale === 1) return; // the page scrolls on
    event.preventDefault();
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const [x, y] = [(2 * event.offsetX) / width - 1, 1 - (2 * event.offsetY) / height];
    this.zoom(by, [this.#centre[0] + x / this.#scale, this.#centre[1] + y / this.#scale]);
  }

  #place(i) {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const margin = 14;
    const x = (this.#map.x[i] - this.#centre[0]) * this.#scale;
    const y = (this.#map.y[i] - this.#centre[1]) * this.#scale;
    return [margin + ((x + 1) / 2) * (width - 2 * margin), margin + ((1 - y) / 2) * (height - 2 * margin)];
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    if (!this.#map || !width) return;
    const ratio = devicePixelRatio;
    this.#canvas.width = width * ratio;
    this.#canvas.height = height * ratio;
    const context = this.#canvas.getContext("2d");
    context.scale(ratio, ratio);
    const ids = this.#map.class_ids;
    const radius = ids.length > 2000 ? 2.5 : ids.length > 400 ? 3.5 : 5;
    const dot = (i, r) => {
      context.fillStyle = colour(ids[i]);
      context.beginPath();
      context.arc(...this.#place(i), r, 0, 2 * Math.PI);
      context.fill();
    };
    const stands = (i) => this.#classId === null || ids[i] === this.#classId;
    for (const front of [false, true]) {
      context.globalAlpha = front ? 0.85 : 0.15;
      for (let i = 0; i < ids.length; i++) if (stands(i) === front) dot(i, radius);
    }
    context.globalAlpha = 1;
    if (this.#chosen < 0) return;
    dot(this.#chosen, radius + 1);
    context.strokeStyle = getComputedStyle(this.#canvas).color;
    context.lineWidth = 2;
    context.beginPath();
    context.arc(...this.#place(this.#chosen), radius + 4, 0, 2 * Math.PI);
    context.stroke();
  }

  #choose(i) {
    if (!this.#map?.key_ids.length || i === this.#chosen) return;
    this.#chosen = i;
    this.#draw();
    this.#onChoose(this.#map.key_ids[i]);
  }

  #point(event) {
    if (!this.#map) return;
    let best = -1;
    let least = NEAR;
    for (let i = 0; i < this.#map.key_ids.length; i++) {
      const [x, y] = this.#place(i);
      const distance = Math.hypot(x - event.offsetX, y - event.offsetY);
      if (distance < least) [best, least] = [i, distance];
    }
    if (best >= 0) this.#choose(best);
  }

  /** The nearest key in the arrow's direction; what lies aside counts as farther. */
  #key(event) {
    const direction = ARROWS[event.key];
    const closer = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 0 }[event.key];
    if (closer !== undefined && !event.ctrlKey && !event.metaKey) return this.zoom(closer);
    if (!this.#map?.key_ids.length || !(direction || event.key === "Home")) return;
    event.preventDefault();
    if (!direction || this.#chosen < 0) return this.#choose(0);
    const [x, y] = this.#place(this.#chosen);
    let best = -1;
    let least = Infinity;
    for (let i = 0; i < this.#map.key_ids.length; i++) {
      const [px, py] = this.#place(i);
      const along = (px - x) * direction[0] + (py - y) * direction[1];
      const aside = Math.abs((px - x) * direction[1]) + Math.abs((py - y) * direction[0]);
      if (along > 0 && along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
    }
    if (best >= 0) this.#choose(best);
  }
}
