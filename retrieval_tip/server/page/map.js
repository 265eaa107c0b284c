// A two-dimensional map of the keys on a canvas. Its photos can also be found in the list of examples, by keyboard.

import { cut, el, framed, plural } from "./dom.js";

const NEAR = 14; // maximum distance of the pointer from a key, in px
const DRAWN = 6; // minimum length of a drag in px; a shorter drag is a click
const NAMED = 60; // maximum number of classes whose names are drawn
const SIDE = 44; // side of an image and its cell, in px
const BESIDE = [0, -34, 34, -52, 52]; // distances of a name from the middle of its class, best first, in px
const NEAREST = 8; // number of keys that determine the place of a photo
const dark = matchMedia("(prefers-color-scheme: dark)");

/** Return the colour of a class. Consecutive ids get very different hues. */
const colour = (classId) => `oklch(${dark.matches ? 0.76 : 0.58} 0.15 ${(classId * 137.508 + 20) % 360})`;

const flat = new OffscreenCanvas(1, 1).getContext("2d"); // tells which points are inside a path

/** Return the place of a photo on a map, or null. It is the mean of the places of the most similar keys, weighted by
 *  exp(-beta (1 - affinity)). */
export function placeOf({ key_ids: ids, places }, { similar, without }, beta) {
  const at = new Map(ids.map((id, i) => [id, i]));
  const near = similar.filter(({ key_id: id }) => at.has(id) && !without.includes(id)).slice(0, NEAREST);
  if (!near.length) return null;
  const weights = near.map(({ affinity }) => Math.exp(beta * (affinity - near[0].affinity)));
  const whole = weights.reduce((sum, weight) => sum + weight, 0);
  return [0, 1].map((axis) => near.reduce((sum, { key_id: id }, j) => sum + (weights[j] * places[at.get(id)][axis]) / whole, 0));
}

export class KeyMap {
  #canvas;
  #on;
  #map = null;
  #chosen = -1;
  #star = null;
  #rings = []; // places of other new photos, and the class of their answers, or -1
  #scale = 1;
  #centre = [0, 0]; // centre of the view, in map coordinates
  #drag = null; // { path, far, at, centre } while a button is pressed; `path` is null while the map is moved
  #images = new Map(); // by key id
  #asking = 0;
  #soon = framed(() => this.#draw());

  /** `on.chosen(keyId, classId)` is called for the key at the pointer, or with undefined if there is none, and
   *  `on.taken(keyIds)` for the keys that are inside a shape. `on.image(keyId)` returns the address of an image or null,
   *  and `on.name(classId)` a class name. */
  constructor(canvas, on) {
    this.#canvas = canvas;
    this.#on = on;
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointerup", () => this.#up());
    canvas.addEventListener("pointercancel", () => ((this.#drag = null), this.#soon()));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    dark.addEventListener("change", () => this.#soon());
    new ResizeObserver(() => this.#draw()).observe(canvas);
  }

  /** Show another map of the same index. The key that was shown last stays so. */
  show(map) {
    this.#chosen = map.key_ids.indexOf(this.#map?.key_ids[this.#chosen]);
    this.#map = map;
    this.#images.clear();
    this.zoom(0);
    this.#on.chosen(map.key_ids[this.#chosen], map.class_ids[this.#chosen]);
    this.#canvas.dataset.method = map.explained ? "pca" : "tsne";
    this.#canvas.setAttribute("aria-label", `Map of ${plural(map.key_ids.length, "photo")}, coloured by class`);
    this.#draw();
  }

  /** Forget the map, because another index is opened. */
  clear() {
    this.#map = null;
  }

  /** Draw a star at [x, y], or no star if `place` is null, and rings given as [place, class id]. */
  star(place, rings = []) {
    this.#star = place;
    this.#rings = rings;
    this.#canvas.dataset.star = place ? place.map((value) => value.toFixed(4)).join() : "";
    this.#soon();
  }

  /** Zoom by a factor around a place. A factor of 0 fits the map to the canvas. */
  zoom(by, [x, y] = this.#centre) {
    if (!this.#map) return;
    const scale = by ? Math.min(64, Math.max(1, this.#scale * by)) : 1;
    const keep = this.#scale / scale; // the place stays under the pointer
    this.#scale = scale;
    this.#look([x + (this.#centre[0] - x) * keep, y + (this.#centre[1] - y) * keep]);
    this.#canvas.dataset.scale = scale;
  }

  /** Centre the view on a place, but keep it within the map. */
  #look(centre) {
    const limit = 1 - 1 / this.#scale;
    this.#centre = centre.map((value) => Math.min(limit, Math.max(-limit, value)));
    this.#soon();
  }

  #wheel(event) {
    const by = event.deltaY < 0 ? 1.25 : 0.8;
    if (!this.#map || (by < 1 && this.#scale === 1)) return; // so that the page can scroll
    event.preventDefault();
    const [width, height] = this.#size;
    const [x, y] = [(2 * event.offsetX) / width - 1, 1 - (2 * event.offsetY) / height];
    this.zoom(by, [this.#centre[0] + x / this.#scale, this.#centre[1] + y / this.#scale]);
  }

  get #size() {
    return [this.#canvas.clientWidth, this.#canvas.clientHeight];
  }

  #at = (i) => this.#map.places[i];

  #place = (i) => this.#placed(this.#at(i));

  #placed(at) {
    const [width, height] = this.#size;
    const margin = SIDE / 2 + 2;
    const [x, y] = at.map((value, axis) => (value - this.#centre[axis]) * this.#scale);
    return [margin + ((x + 1) / 2) * (width - 2 * margin), margin + ((1 - y) / 2) * (height - 2 * margin)];
  }

  #draw() {
    const [width, height] = this.#size;
    if (!this.#map || !width) return;
    const ratio = devicePixelRatio;
    this.#canvas.width = width * ratio;
    this.#canvas.height = height * ratio;
    const context = this.#canvas.getContext("2d");
    context.scale(ratio, ratio);
    const ids = this.#map.class_ids;
    const radius = ids.length > 2000 ? 2.5 : ids.length > 400 ? 3.5 : 5;
    const { color: ink, backgroundColor: paper } = getComputedStyle(this.#canvas);
    const dot = (style, r, places) => {
      const path = new Path2D(); // drawing one path per class is fast
      for (const [x, y] of places) {
        path.moveTo(x + r, y);
        path.arc(x, y, r, 0, 2 * Math.PI);
      }
      context.fillStyle = style;
      context.fill(path);
    };
    const dots = (some, r) => {
      for (const [classId, own] of Map.groupBy(some, (i) => ids[i])) dot(colour(classId), r, own.map(this.#place));
    };
    const line = (path, style, lineWidth) => {
      Object.assign(context, { strokeStyle: style, lineWidth });
      context.stroke(path);
    };
    const ring = ([x, y], r, lineWidth = 2) => {
      const path = new Path2D();
      path.arc(x, y, r, 0, 2 * Math.PI);
      line(path, ink, lineWidth);
    };
    const seen = [...ids.keys()].filter((i) => {
      const [x, y] = this.#place(i);
      return x > -SIDE && y > -SIDE && x < width + SIDE && y < height + SIDE;
    });
    context.globalAlpha = 0.85;
    dots(seen, radius);
    context.globalAlpha = 1;
    const pictured = this.#pictures(context, seen);
    for (const [at, classId] of this.#rings) {
      context.globalAlpha = 0.6;
      ring(this.#placed(at), radius + 2, 1);
      context.globalAlpha = 1;
      if (classId >= 0) dot(colour(classId), radius, [this.#placed(at)]);
    }
    this.#names(context, seen, pictured, ink, paper);
    if (this.#star) {
      Object.assign(context, { font: "28px system-ui", textAlign: "center", textBaseline: "middle", lineWidth: 4, strokeStyle: paper, fillStyle: ink });
      context.strokeText("★", ...this.#placed(this.#star));
      context.fillText("★", ...this.#placed(this.#star));
    }
    if (this.#chosen >= 0) {
      dots([this.#chosen], radius + 1);
      ring(this.#place(this.#chosen), radius + 4);
    }
    if (this.#drag?.path) {
      const shape = new Path2D(this.#drag.path);
      shape.closePath();
      Object.assign(context, { globalAlpha: 0.12, fillStyle: ink });
      context.fill(shape);
      context.globalAlpha = 1;
      line(shape, ink, 1.5);
    }
  }

  /** Write the name of each class near its middle, largest class first, where it covers no image and no other name. */
  #names(context, seen, pictured, ink, paper) {
    const groups = [...Map.groupBy(seen, (i) => this.#map.class_ids[i])];
    if (groups.length > NAMED) return;
    const middle = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];
    const written = [];
    Object.assign(context, { font: "600 14px Inter, system-ui", textAlign: "center", lineWidth: 4, strokeStyle: paper, fillStyle: ink });
    for (const [classId, own] of groups.sort((a, b) => b[1].length - a[1].length)) {
      const places = own.map(this.#place);
      const centre = [0, 1].map((axis) => middle(places.map((place) => place[axis])));
      const apart = places.map((place) => Math.hypot(place[0] - centre[0], place[1] - centre[1]));
      const [x, own_y] = places[apart.indexOf(Math.min(...apart))]; // the middle of two groups may be empty
      const name = cut(this.#on.name(classId));
      const half = context.measureText(name).width / 2 + 4;
      const clear = (y) => ![...written, ...pictured].some(([ax, ay, w, h]) => Math.abs(ax - x) < w + half && Math.abs(ay - y) < h + 10);
      const y = BESIDE.map((by) => own_y + by).find(clear);
      if (y === undefined) continue;
      written.push([x, y, half, 10]);
      context.strokeText(name, x, y);
      context.fillText(name, x, y);
    }
    this.#canvas.dataset.names = written.length;
  }

  /** Draw images where there is room for them, request missing images, and return the boxes of the drawn ones. */
  #pictures(context, seen) {
    const taken = new Set();
    const [wanted, drawn] = [[], []];
    for (const i of seen) {
      const [x, y] = this.#place(i);
      const cells = [-1, 0, 1].flatMap((dx) => [-1, 0, 1].map((dy) => `${Math.floor(x / SIDE) + dx} ${Math.floor(y / SIDE) + dy}`));
      if (cells.some((cell) => taken.has(cell))) continue;
      const id = this.#map.key_ids[i];
      const image = this.#images.get(id);
      if (!image && this.#on.image(id)) wanted.push(id);
      taken.add(cells[4]); // the cell of this key
      if (!image?.complete || !image.naturalWidth) continue;
      const side = Math.min(image.naturalWidth, image.naturalHeight);
      const [left, top] = [(image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2];
      context.drawImage(image, left, top, side, side, x - SIDE / 2, y - SIDE / 2, SIDE, SIDE);
      context.strokeStyle = colour(this.#map.class_ids[i]);
      context.lineWidth = 3;
      context.strokeRect(x - SIDE / 2, y - SIDE / 2, SIDE, SIDE);
      drawn.push([x, y, SIDE / 2, SIDE / 2]);
    }
    clearTimeout(this.#asking);
    if (wanted.length) this.#asking = setTimeout(() => this.#ask(wanted), 150);
    return drawn;
  }

  #ask(ids) {
    for (const id of ids) this.#images.set(id, el("img", { onload: this.#soon, src: `${this.#on.image(id)}?size=96` }));
    this.#canvas.dataset.pictures = this.#images.size;
  }

  #choose(i) {
    if (i === this.#chosen) return;
    this.#chosen = i;
    this.#soon();
    this.#on.chosen(this.#map.key_ids[i], this.#map.class_ids[i]);
  }

  #down(event) {
    this.#point(event);
    if (event.button) return;
    this.#canvas.setPointerCapture(event.pointerId);
    const at = [event.offsetX, event.offsetY];
    const path = event.shiftKey ? null : new Path2D();
    path?.moveTo(...at);
    this.#drag = { path, far: false, at, centre: this.#centre };
  }

  #move(event) {
    if (!this.#drag) return this.#point(event);
    const { path, at, centre } = this.#drag;
    const by = [event.offsetX - at[0], event.offsetY - at[1]];
    if (path) {
      path.lineTo(event.offsetX, event.offsetY);
      this.#drag.far ||= Math.hypot(...by) > DRAWN;
      return this.#soon();
    }
    const [width, height] = this.#size;
    this.#look([centre[0] - (2 * by[0]) / width / this.#scale, centre[1] + (2 * by[1]) / height / this.#scale]);
  }

  #up() {
    const { path, far } = this.#drag ?? {};
    this.#drag = null;
    this.#soon();
    if (!this.#map || !path || !far) return;
    const inside = [...this.#map.key_ids.keys()].filter((i) => flat.isPointInPath(path, ...this.#place(i), "evenodd"));
    if (inside.length) this.#on.taken(inside.map((i) => this.#map.key_ids[i]));
  }

  /** Select the key that is nearest to the pointer. */
  #point(event) {
    if (!this.#map) return;
    let [best, least] = [-1, NEAR];
    for (const i of this.#map.key_ids.keys()) {
      const [x, y] = this.#place(i);
      const far = Math.hypot(x - event.offsetX, y - event.offsetY);
      if (far < least) [best, least] = [i, far];
    }
    if (best >= 0) this.#choose(best);
  }
}
