// The map of the example photos on a canvas, which a list replaces for the keyboard. A "taken" event has circled key ids.

import * as api from "./api.js";
import { photos } from "./classify.js";
import { $, count, cut, el, framed, picture, plural } from "./dom.js";
import { state } from "./state.js";

const NEAR = 14; // maximum distance of the pointer from a key, in px
const DRAWN = 6; // minimum length of a drag in px; a shorter drag is a click
const NAMED = 60; // maximum number of classes whose names are drawn
const SIDE = 44; // side of an image and its cell, in px
const BESIDE = [0, -34, 34, -52, 52]; // distances of a name from the middle of its class, best first, in px
const NEAREST = 8; // number of keys that determine the place of a photo
const RINGS = 500; // maximum number of photos of the page on the map
const canvas = $("map-canvas");
const context = canvas.getContext("2d");
const dark = matchMedia("(prefers-color-scheme: dark)");
const soon = framed(draw);

let map = null; // GET /v1/indexes/{name}/map, or null before it is opened
let pictured = false; // whether the server has images of the examples
let chosen = -1; // position of the key that the pointer was at
let rings = []; // places of the photos of the page, and the class of their answers, or -1
let scale = 1;
let centre = [0, 0]; // centre of the view, in map coordinates
let drag = null; // { path, far, at, from } while a button is pressed; `path` is null while the map is moved
let asking = 0; // the timer of the next request for images
const images = new Map(); // by key id

/** Return the colour of a class. Consecutive ids get very different hues. */
const colour = (classId) => `oklch(${dark.matches ? 0.76 : 0.58} 0.15 ${(classId * 137.508 + 20) % 360})`;

/** Show a map, with images if the server has them. The chosen key stays so. Return a line that tells if it is empty. */
export function showMap(found, hasImages) {
  const keyId = map?.key_ids[chosen];
  [map, pictured] = [found, hasImages];
  images.clear();
  $("map-facts").textContent = map.key_ids.length < map.total ? `${count(map.key_ids.length)} of ${count(map.total)} photos` : "";
  $("map").hidden = !map.key_ids.length;
  canvas.dataset.method = map.method;
  canvas.ariaLabel = `Map of ${plural(map.key_ids.length, "photo")}, coloured by class`;
  zoom(0);
  choose(map.key_ids.indexOf(keyId));
  mark();
  return map.key_ids.length ? "" : "There are no example photos yet.";
}

/** Forget the map, because another index is opened. */
export const clear = () => (map = null);

/** Mark the photos of the page with rings. */
export function mark() {
  if (!map) return;
  const at = new Map(map.key_ids.map((id, i) => [id, i]));
  const answer = (one) => (one.no_match ? -1 : state.labels.indexOf(one.taught ?? one.winner?.label));
  rings = photos.slice(0, RINGS).map((one) => [placeOf(one, at), answer(one)]).filter(([place]) => place);
  canvas.dataset.rings = rings.map(([place]) => place.map((value) => value.toFixed(4))).join();
  soon();
}

/** Return the place of a photo on the map, or null. It is the mean of the places of the most similar keys, weighted by
 *  exp(-beta (1 - affinity)). `at` has the positions of the keys. */
function placeOf({ current, similar, without }, at) {
  const near = current ? similar.filter(({ key_id: id }) => at.has(id) && !without.includes(id)).slice(0, NEAREST) : [];
  if (!near.length) return null;
  const weights = near.map(({ affinity }) => Math.exp(state.info.beta * (affinity - near[0].affinity)));
  const whole = weights.reduce((sum, weight) => sum + weight, 0);
  return [0, 1].map((axis) => near.reduce((sum, { key_id: id }, j) => sum + (weights[j] * map.places[at.get(id)][axis]) / whole, 0));
}

const imageOf = (keyId) => (pictured ? api.pictureOf(state.info.name, keyId) : null);

/** Choose the key at a position, and show it beside the map, or no key if the position is -1. */
function choose(i) {
  chosen = i;
  soon();
  if (i < 0) return $("map-shot").replaceChildren();
  const [id, label] = [map.key_ids[i], state.labels[map.class_ids[i]]];
  const texts = [el("strong", { class: "name", title: label }, cut(label)), el("span", { class: "hint" }, `photo ${id}`)];
  $("map-shot").replaceChildren(picture(imageOf(id), 320, ""), el("p", {}, ...texts));
}

// --- the view ---

const size = () => [canvas.clientWidth, canvas.clientHeight];

/** Zoom by a factor around a place. A factor of 0 fits the map to the canvas. */
function zoom(by, [x, y] = centre) {
  if (!map) return;
  const before = scale;
  scale = by ? Math.min(64, Math.max(1, scale * by)) : 1;
  const keep = before / scale; // the place stays under the pointer
  look([x + (centre[0] - x) * keep, y + (centre[1] - y) * keep]);
  canvas.dataset.scale = scale;
}

/** Centre the view on a place, but keep it within the map. */
function look(place) {
  const limit = 1 - 1 / scale;
  centre = place.map((value) => Math.min(limit, Math.max(-limit, value)));
  soon();
}

/** Return the point of the canvas that shows a place. */
function pointOf(place) {
  const [width, height] = size();
  const margin = SIDE / 2 + 2;
  const [x, y] = place.map((value, axis) => (value - centre[axis]) * scale);
  return [margin + ((x + 1) / 2) * (width - 2 * margin), margin + ((1 - y) / 2) * (height - 2 * margin)];
}

const keyPoint = (i) => pointOf(map.places[i]);

// --- drawing ---

function draw() {
  const [width, height] = size();
  if (!map || !width) return;
  Object.assign(canvas, { width: width * devicePixelRatio, height: height * devicePixelRatio });
  context.scale(devicePixelRatio, devicePixelRatio);
  const { color: ink, backgroundColor: paper } = getComputedStyle(canvas);
  const ids = map.class_ids;
  const radius = ids.length > 2000 ? 2.5 : ids.length > 400 ? 3.5 : 5;
  const circles = (points, r) => {
    const path = new Path2D(); // drawing one path per class is fast
    for (const [x, y] of points) {
      path.moveTo(x + r, y);
      path.arc(x, y, r, 0, 2 * Math.PI);
    }
    return path;
  };
  const dots = (pairs, r) => {
    for (const [classId, own] of Map.groupBy(pairs, ([, id]) => id)) {
      context.fillStyle = colour(classId);
      context.fill(circles(own.map(([point]) => point), r));
    }
  };
  const line = (path, lineWidth) => {
    Object.assign(context, { strokeStyle: ink, lineWidth });
    context.stroke(path);
  };
  const write = (font, text, x, y) => {
    Object.assign(context, { font, textAlign: "center", textBaseline: "middle", lineWidth: 4, strokeStyle: paper, fillStyle: ink });
    context.strokeText(text, x, y);
    context.fillText(text, x, y);
  };
  const seen = [...ids.keys()].filter((i) => {
    const [x, y] = keyPoint(i);
    return x > -SIDE && y > -SIDE && x < width + SIDE && y < height + SIDE;
  });
  const others = rings.map(([place, classId]) => [pointOf(place), classId]);
  context.globalAlpha = 0.85;
  dots(seen.map((i) => [keyPoint(i), ids[i]]), radius);
  context.globalAlpha = 1;
  const pictures = drawPictures(seen);
  context.globalAlpha = 0.6;
  line(circles(others.map(([point]) => point), radius + 2), 1);
  context.globalAlpha = 1;
  dots(others.filter(([, classId]) => classId >= 0), radius);
  drawNames(seen, pictures, write);
  if (chosen >= 0) {
    dots([[keyPoint(chosen), ids[chosen]]], radius + 1);
    line(circles([keyPoint(chosen)], radius + 4), 2);
  }
  if (drag?.path) {
    const shape = new Path2D(drag.path);
    shape.closePath();
    Object.assign(context, { globalAlpha: 0.12, fillStyle: ink });
    context.fill(shape);
    context.globalAlpha = 1;
    line(shape, 1.5);
  }
}

/** Write the name of each class near its middle, largest class first, where it covers no image and no other name. */
function drawNames(seen, pictures, write) {
  const groups = [...Map.groupBy(seen, (i) => map.class_ids[i])];
  if (groups.length > NAMED) return;
  const middle = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];
  const written = [];
  const font = "600 14px Inter, system-ui";
  for (const [classId, own] of groups.sort((a, b) => b[1].length - a[1].length)) {
    const points = own.map(keyPoint);
    const [left, top] = [0, 1].map((axis) => middle(points.map((point) => point[axis])));
    const apart = points.map((point) => Math.hypot(point[0] - left, point[1] - top));
    const [x, nearest] = points[apart.indexOf(Math.min(...apart))]; // the middle of two groups may be empty
    const name = cut(state.labels[classId]);
    context.font = font;
    const half = context.measureText(name).width / 2 + 4;
    const clear = (y) => ![...written, ...pictures].some(([ax, ay, w, h]) => Math.abs(ax - x) < w + half && Math.abs(ay - y) < h + 10);
    const y = BESIDE.map((by) => nearest + by).find(clear);
    if (y === undefined) continue;
    written.push([x, y, half, 10]);
    write(font, name, x, y);
  }
  canvas.dataset.names = written.length;
}

/** Draw images where there is room for them, request missing images, and return the boxes of the drawn ones. */
function drawPictures(seen) {
  const taken = new Set();
  const [wanted, drawn] = [[], []];
  for (const i of pictured ? seen : []) {
    const [x, y] = keyPoint(i);
    const cells = [-1, 0, 1].flatMap((dx) => [-1, 0, 1].map((dy) => `${Math.floor(x / SIDE) + dx} ${Math.floor(y / SIDE) + dy}`));
    if (cells.some((cell) => taken.has(cell))) continue;
    taken.add(cells[4]); // the cell of this key
    const image = images.get(map.key_ids[i]);
    if (!image) wanted.push(map.key_ids[i]);
    if (!image?.complete || !image.naturalWidth) continue;
    const side = Math.min(image.naturalWidth, image.naturalHeight);
    const [left, top] = [(image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2];
    const box = [x - SIDE / 2, y - SIDE / 2, SIDE, SIDE];
    context.drawImage(image, left, top, side, side, ...box);
    Object.assign(context, { strokeStyle: colour(map.class_ids[i]), lineWidth: 3 });
    context.strokeRect(...box);
    drawn.push([x, y, SIDE / 2, SIDE / 2]);
  }
  clearTimeout(asking);
  if (wanted.length) asking = setTimeout(() => ask(wanted), 150);
  return drawn;
}

function ask(ids) {
  for (const id of ids) images.set(id, el("img", { onload: soon, src: `${imageOf(id)}?size=96` }));
  canvas.dataset.pictures = images.size;
}

// --- the pointer ---

/** Choose the key that is nearest to the pointer. */
function point({ offsetX, offsetY }) {
  let [best, least] = [-1, NEAR];
  for (const i of map?.key_ids.keys() ?? []) {
    const [x, y] = keyPoint(i);
    const far = Math.hypot(x - offsetX, y - offsetY);
    if (far < least) [best, least] = [i, far];
  }
  if (best >= 0 && best !== chosen) choose(best);
}

canvas.addEventListener("pointerdown", (event) => {
  point(event);
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  const at = [event.offsetX, event.offsetY];
  const path = event.shiftKey ? null : new Path2D();
  path?.moveTo(...at);
  drag = { path, far: false, at, from: centre };
});
canvas.addEventListener("pointermove", (event) => {
  if (!drag) return point(event);
  const [across, down] = [event.offsetX - drag.at[0], event.offsetY - drag.at[1]];
  if (drag.path) {
    drag.path.lineTo(event.offsetX, event.offsetY);
    drag.far ||= Math.hypot(across, down) > DRAWN;
    return soon();
  }
  const [width, height] = size();
  look([drag.from[0] - (2 * across) / width / scale, drag.from[1] + (2 * down) / height / scale]);
});
canvas.addEventListener("pointerup", () => {
  const { path, far } = drag ?? {};
  drag = null;
  soon();
  if (!map || !path || !far) return;
  context.resetTransform(); // the path has the points of the screen
  const inside = map.key_ids.filter((_, i) => context.isPointInPath(path, ...keyPoint(i), "evenodd"));
  if (inside.length) canvas.dispatchEvent(new CustomEvent("taken", { detail: inside }));
});
canvas.addEventListener("pointercancel", () => ((drag = null), soon()));
canvas.addEventListener(
  "wheel",
  (event) => {
    const by = event.deltaY < 0 ? 1.25 : 0.8;
    if (!map || (by < 1 && scale === 1)) return; // so that the page can scroll
    event.preventDefault();
    const [width, height] = size();
    const [x, y] = [(2 * event.offsetX) / width - 1, 1 - (2 * event.offsetY) / height];
    zoom(by, [centre[0] + x / scale, centre[1] + y / scale]);
  },
  { passive: false },
);
for (const [id, by] of [["map-closer", 1.5], ["map-farther", 1 / 1.5], ["map-whole", 0]])
  $(id).addEventListener("click", () => zoom(by));
dark.addEventListener("change", soon);
new ResizeObserver(draw).observe(canvas);
