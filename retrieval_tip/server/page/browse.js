// The screens of a classifier: its classes and example photos, labels to check, the map, and the history.

import { gained } from "./accuracy.js";
import * as api from "./api.js";
import { looked, photos } from "./classify.js";
import { askName, confirmed } from "./dialogs.js";
import { $, attempt, button, count, cut, debounced, el, failure, isFor, named, nameOf, picks, picture, plural, refill, short } from "./dom.js";
import { Grid } from "./grid.js";
import { fetchHistory, showHistory } from "./history.js";
import { KeyMap, placeOf } from "./map.js";
import { undoable } from "./notice.js";
import { settings } from "./settings.js";
import { state } from "./state.js";

const MOST = 10_000; // examples to list; the others can be found with the filters
const SUSPECTS = 1000; // suspicious labels to fetch
const ASKED = 500; // key ids per request
const MAPPED = 10_000; // maximum number of examples on the map; if there are more, each class is sampled
const MINUTES = 20 * 60_000; // ms that computing a map may take
const RINGS = 500; // maximum number of new photos on the map
const FEW = 4; // a class that has fewer examples needs more
const CARDS = 24; // classes to show at first

/** A part of the view whose content is fetched. Its state line shows progress or errors, or tells that it is empty. */
class Part {
  #asked = new AbortController();
  #version = ""; // name and version of the index that is shown

  constructor(name, fetchPart, show) {
    this.state = $(`${name}-state`);
    this.fetchPart = fetchPart;
    this.show = show;
  }

  /** Load the part, unless it shows the current version of the index. */
  follow() {
    if (this.#version !== current()) this.load();
  }

  load() {
    this.#version = current();
    this.#asked.abort(); // so that a late response does not replace a newer one
    this.#asked = new AbortController();
    const { signal } = this.#asked;
    const waiting = (problem) => (this.state.textContent = api.retrying(problem));
    return attempt(this.state, async () => {
      this.state.textContent = "Loading…";
      const found = await this.fetchPart({ signal, waiting });
      signal.throwIfAborted();
      this.state.textContent = this.show(found) ?? "";
    });
  }
}

const current = () => `${state.info.name} ${state.info.version}`;

/** Make a change. Then show its description `what` and its effect on the accuracy, and offer to undo it. */
async function changed(what, change, heading) {
  const before = state.info.version;
  const accuracy = state.accuracy();
  $("problem").replaceChildren();
  try {
    const done = await change();
    if (!done) return;
    grid.select([]);
    $("audit-next").hidden = false;
    $("audit-next").lastElementChild.textContent = `retrieval-tip sort ${quoted(state.info.name)} photos --into fixed`;
    const told = [what, ...(done.warnings ?? [])].join(". ");
    const more = undoable(`${told}.`, before, done.version);
    heading.focus();
    gained(accuracy).then((gain) => gain && more(`${told}.${gain}`));
  } catch (error) {
    $("problem").replaceChildren(failure(error));
  }
}

/** Quote a word for a shell. */
const quoted = (word) => (/^[\w.-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
const examples = (number) => plural(number, "example photo");
const idsOf = (some) => some.map(({ key_id: id }) => id);
const move = (some, label, heading) =>
  changed(`Moved ${examples(some.length)} to ${label}`, () => state.relabel(some.map((shot) => [shot.key_id, label])), heading);

async function remove(some, heading) {
  const shown = [picture(some[0].image, 160, nameOf(some[0].source)), el("p", {}, ...described(some[0]))];
  if (!(await confirmed(`Remove ${examples(some.length)}?`, "You can undo this.", "Remove", { shown }))) return;
  await changed(`Removed ${examples(some.length)}`, () => state.remove(idsOf(some)), heading);
}

const described = ({ key_id: id, label, source = "" }) => [
  el("strong", { class: "name", title: label }, cut(label)),
  el("span", { class: "source", title: source }, cut(nameOf(source))),
  el("span", { class: "hint" }, `photo ${id}`),
];

// --- settings ---

function showAbout() {
  const { info } = state;
  $("groups").hidden = !info.changes;
  fill($("about"), {
    name: info.name,
    version: `${info.version} (${info.change}), ${new Date(info.created_at).toLocaleString()}`,
    "example photos": count(info.n_keys),
    classes: count(info.counts.length),
    groups: info.levels.slice(1).join(", "),
    encoder: info.backbone ?? "none (only features are accepted)",
  });
  const { alpha, beta, temperature, source } = info.provenance;
  fill($("provenance"), {
    source,
    alpha: `${short(info.alpha)} (${alpha})`,
    beta: `${short(info.beta)} (${beta})`,
    k: info.k === "all" ? "all" : `${info.k}, ${info.tail ? "with" : "without"} tail`,
    temperature: `${short(info.temperature)} (${temperature})`,
    prompts: info.text ? info.templates.join(" · ") || "none (text features were given)" : "none (class names are not used)",
  });
}

/** Set the groups of the classes from a table. */
export const setGroups = (table) => changed("Set the groups of the classes", () => state.setGroups(table), $("groups-title"));
picks($("groups-file"), ([table]) => setGroups(table), $("groups-choose"));

function fill(list, facts) {
  const shown = Object.entries(facts).filter(([, value]) => value);
  list.replaceChildren(...shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

// --- classes ---

let allCards = false; // whether all classes are shown

const classes = new Part(
  "classes",
  () => Promise.all([state.exemplars(), state.accuracy()]),
  ([exemplars, accuracy]) => {
    const { info } = state;
    const images = new Map(exemplars.map((one) => [one.class_id, one.image]));
    const weakest = new Map((accuracy?.weakest ?? []).map(([label, right, photos]) => [label, `${right} of ${photos} right`]));
    const place = new Map([...weakest.keys()].map((label, i) => [label, i]));
    const doubted = Map.groupBy(listed, ({ label }) => label);
    const wanted = $("classes-filter").value.trim().toLowerCase();
    const found = state.labels
      .map((label, id) => ({ label, keys: info.counts[id], image: images.get(id) }))
      .filter(({ label }) => label.toLowerCase().includes(wanted))
      .sort((a, b) => (place.get(a.label) ?? Infinity) - (place.get(b.label) ?? Infinity) || 0); // weakest classes first
    $("classes-count").textContent = found.length < info.counts.length ? `${count(found.length)} of ${count(info.counts.length)}` : count(found.length);
    $("classes-add").hidden = !info.changes || !info.images;
    for (const id of ["classes-hint", "classes-edit"]) $(id).hidden = !info.changes;
    const card = (one) => classCard(one, weakest.get(one.label), doubted.get(one.label)?.length);
    const shown = allCards ? found : found.slice(0, CARDS);
    refill($("classes-list"), shown.map(card));
    $("classes-all").hidden = shown.length === found.length;
    $("classes-all").textContent = `Show all ${count(found.length)}`;
    return found.length ? "" : "No classes match this filter.";
  },
);

function classCard({ label, keys, image }, weak, doubted) {
  const needs = [weak, keys < FEW ? "needs more photos" : doubted ? `${doubted} to check` : ""].filter(Boolean).join(", ");
  const show = () => {
    $("shots-class").value = label;
    shots.load();
    $("shots-title").scrollIntoView();
    $("shots-title").focus({ preventScroll: true });
  };
  const parts = [
    picture(image, 240, ""),
    el("span", { class: "name" }, cut(label)),
    el("span", { class: "count" }, plural(keys, "photo")),
    el("span", { class: "needs" }, needs),
  ];
  const whole = button(parts, show, { title: `Example photos of ${label}`, data: { label, keys } });
  if (!state.info.changes) return el("li", {}, whole);
  const act = (text, said, onclick) => button(text, onclick, { class: "quiet", aria: { label: said } });
  const other = act("Rename", `Rename ${label}`, () => rename(label));
  const wanted = () => {
    location.hash = "#teach";
    state.dispatchEvent(new CustomEvent("wanted", { detail: label }));
  };
  const more = weak || keys < FEW ? act("Add photos", `Add photos of ${label}`, wanted) : null;
  const card = el("li", { draggable: true, data: { label } }, whole, el("span", { class: "acts" }, more, other));
  card.querySelector("img")?.setAttribute("draggable", "false"); // so that the card is dragged
  return card;
}

let dragged = null; // the class whose card is dragged

/** Return the card under the pointer that the dragged class can be merged into. */
function targetOf({ target }) {
  const card = target.closest?.("li");
  return dragged && card && card.dataset.label !== dragged ? card : null;
}

function mark(card) {
  $("classes-list").querySelector(".target")?.classList.remove("target");
  card?.classList.add("target");
}

$("classes-list").addEventListener("dragstart", (event) => {
  dragged = event.target.closest("li").dataset.label;
  event.dataTransfer.effectAllowed = "move";
  event.dataTransfer.setData("text/plain", dragged);
});
$("classes-list").addEventListener("dragover", (event) => {
  mark(targetOf(event));
  if (targetOf(event)) event.preventDefault(); // so that the card can be dropped here
});
$("classes-list").addEventListener("drop", (event) => {
  const card = targetOf(event);
  if (!card) return;
  event.preventDefault();
  merge(dragged, card.dataset.label);
});
$("classes-list").addEventListener("dragend", () => (mark(null), (dragged = null)));

const merge = (label, into) => changed(`Merged ${label} into ${into}`, () => state.rename(label, into), $("classes-title"));

/** Ask for the new name of a class. If another class already has it, the two are merged. */
async function rename(label) {
  const isTaken = (name) => name !== label && state.labels.includes(name);
  const hint = (name) => (isTaken(name) ? `“${name}” already exists. The two classes will be merged.` : "");
  const name = await askName(`Rename “${label}”`, label, "Rename", hint);
  if (!name || name === label) return;
  if (isTaken(name)) merge(label, name);
  else changed(`Renamed ${label} to ${name}`, () => state.rename(label, name), $("classes-title"));
}

// --- example photos ---

const grid = new Grid($("shots"), {
  image: ({ image }) => picture(image, 240, ""),
  tile(shot, element, text, note) {
    element.title = shot.source;
    element.dataset.keyId = shot.key_id;
    text.textContent = shot.label;
    note.textContent = nameOf(shot.source);
  },
  opened: (shot) => grid.toggle(shot),
  chosen() {
    const number = grid.selected.size;
    $("shots-selection").hidden = !number || !state.info.changes;
    $("shots-selected").textContent = `${number} selected`;
  },
  pressed(event) {
    if (event.key !== "Delete" || !grid.selected.size || !state.info.changes) return false;
    remove([...grid.selected], $("shots-title"));
    return true;
  },
});
named($("shots-form"), (label) => move([...grid.selected], label, $("shots-title")));
$("shots-remove").addEventListener("click", () => remove([...grid.selected], $("shots-title")));
$("shots-none").addEventListener("click", () => (grid.select([]), $("shots").focus()));

const shots = new Part(
  "shots",
  async (options) => {
    const wanted = { label: $("shots-class").value, source: $("shots-source").value, limit: MOST };
    if (!mapped) return state.get("/keys", wanted, options);
    const keys = [];
    for (let at = 0; at < mapped.length; at += ASKED)
      keys.push(...(await state.get("/keys", { ...wanted, key_id: mapped.slice(at, at + ASKED) }, options)).keys);
    return { keys, total: keys.length };
  },
  ({ total, keys }) => {
    $("shots-count").textContent = count(total);
    const before = new Map(grid.items.map((shot) => [shot.key_id, shot])); // keeping the same objects keeps the selection
    const all = keys.map((shot) => Object.assign(before.get(shot.key_id) ?? { id: `shot-${shot.key_id}` }, shot));
    grid.show([...Map.groupBy(all, ({ label }) => label).values()].flat());
    if (!total) return "No example photos match this filter.";
    if (keys.length < total) return `These are the first ${count(keys.length)}. Use the filters to find the others.`;
    return state.info.changes ? "" : "This server is read-only, so you cannot move or remove examples.";
  },
);

let mapped = null; // key ids selected on the map, or null for all

/** List and select the examples that have these ids. If `ids` is null, list all examples. */
async function listOnly(ids) {
  mapped = ids;
  $("shots-mapped").hidden = !ids;
  $("classes-list").parentNode.hidden = Boolean(ids); // the photos come first
  if (ids) {
    $("shots-mapped").firstElementChild.textContent = `${plural(ids.length, "photo")} from the map`;
    for (const id of ["shots-class", "shots-source"]) $(id).value = "";
    location.hash = "#classes";
  }
  await shots.load();
  $("shots-title").scrollIntoView();
  $("shots").focus({ preventScroll: true });
  if (ids) grid.select(grid.items);
}
$("shots-all").addEventListener("click", () => listOnly(null));

// --- map ---

let drawn = null; // the current map
let pictured = false; // whether the server has images of the examples

const map = new Part(
  "map",
  async (options) => {
    const made = (method, more) => state.get("/map", { method, limit: MAPPED }, { ...options, ...more });
    pictured = await state.pictured();
    const axes = await made("pca"); // fast, so it is shown until t-SNE is ready
    if (!axes.methods.includes("tsne")) return axes;
    showMap(axes);
    const waiting = () => (map.state.textContent = "This is a preview. A map that keeps similar photos together is being computed…");
    waiting();
    return made("tsne", { waiting, patience: MINUTES });
  },
  showMap,
);
const keyMap = new KeyMap($("map-canvas"), { chosen: pointAt, taken: listOnly, image: imageOf, name: (classId) => state.labels[classId] });

function showMap(found) {
  drawn = found;
  const all = found.key_ids.length === found.total;
  $("map-facts").textContent = all ? "" : `${count(found.key_ids.length)} of ${count(found.total)} photos`;
  $("map").hidden = !found.key_ids.length;
  keyMap.show(found);
  showStar();
  return found.key_ids.length ? "" : "There are no example photos yet.";
}

/** Show the open photo as a star on the map, and the other photos of the page as rings. */
function showStar() {
  const photo = looked();
  const at = (one) => (drawn && one?.current ? placeOf(drawn, one, settings.values.beta) : null);
  const place = at(photo);
  const others = photos.slice(0, RINGS).filter((one) => one !== photo);
  const answer = (one) => (one.no_match ? -1 : state.labels.indexOf(one.taught ?? one.winner?.label));
  keyMap.star(place, others.map((one) => [at(one), answer(one)]).filter(([where]) => where));
  $("map-star").textContent = place ? `★ ${cut(photo.name, 40)} is not on this map. The star marks the examples that it resembles most.` : "";
}

function imageOf(keyId) {
  return pictured && keyId !== null ? api.pictureOf(state.info.name, keyId) : null;
}

function pointAt(keyId, classId) {
  const told = () => [picture(imageOf(keyId), 320, ""), el("p", {}, ...described({ key_id: keyId, label: state.labels[classId] }))];
  $("map-shot").replaceChildren(...(keyId === undefined ? [] : told()));
}

// --- labels to check ---

const KEPT = "retrieval-tip kept"; // for all indexes, so that renamed indexes and copies have the same marks
const kept = () => new Set(JSON.parse(localStorage.getItem(KEPT) ?? "[]"));
const sourceAndLabel = (shot) => JSON.stringify([shot.source, shot.label]);
let suspects = [];
let listed = []; // the suspects that the user has not chosen to keep

const audit = new Part(
  "audit",
  async (options) => {
    pictured = await state.pictured();
    return state.get("/audit", { borderline: $("audit-all").checked, limit: SUSPECTS }, options);
  },
  (all) => {
    suspects = all.map((shot) => ({
      ...shot,
      suggested: shot.suggested === shot.label ? null : shot.suggested, // the same image is also in another class
      image: imageOf(shot.key_id),
      nearest: imageOf(shot.nearest_key_id),
    }));
    return showSuspects();
  },
);

function keep(shot) {
  localStorage.setItem(KEPT, JSON.stringify([...kept(), sourceAndLabel(shot)]));
  $("audit-state").textContent = showSuspects();
  $("audit-title").focus();
}

const movable = () => listed.filter((shot) => shot.suggested !== null);

/** List the suspicious examples that the user has not chosen to keep, and return the text of the state line. */
function showSuspects() {
  const known = kept();
  listed = suspects.filter((shot) => !known.has(sourceAndLabel(shot)));
  $("audit-count").textContent = $("tab-check-count").textContent = count(listed.length);
  refill($("audit"), listed.map((shot, i) => suspicious(shot, i ? 480 : 1024)));
  $("audit-move-all").hidden = listed.length < 2 || !movable().length || !state.info.changes;
  $("audit-move-all").textContent = `Accept all ${movable().length}`;
  classes.load();
  if (listed.length) return "";
  return $("audit-all").checked ? "No suspicious labels were found." : "No clear mistakes were found.";
}

function moveAll() {
  const moves = movable().map((shot) => [shot.key_id, shot.suggested]);
  return changed(`Corrected ${plural(moves.length, "label")}`, () => state.relabel(moves), $("audit-title"));
}
$("audit-all").addEventListener("change", () => audit.load());
$("audit-move-all").addEventListener("click", moveAll);

function suspicious(shot, size) {
  const figure = (url, source, label, caption) => {
    const texts = el("figcaption", {}, `${caption} `, el("span", { class: "name", title: label }, cut(label)));
    return el("figure", { title: source }, picture(url, size, nameOf(source)), texts);
  };
  const act = (text, key, onclick) => {
    const aria = { label: `${text}: photo ${shot.key_id}, ${shot.label}`, keyshortcuts: key };
    return button([`${text} `, el("kbd", {}, key)], onclick, { data: { key }, aria });
  };
  const { suggested, duplicate_of: twin } = shot;
  const heading = $("audit-title");
  const { changes } = state.info;
  const acts = [
    changes && suggested !== null ? act(`Change to ${cut(suggested)}`, "Enter", () => move([shot], suggested, heading)) : null,
    act(`Keep ${cut(shot.label)}`, "K", () => keep(shot)),
    changes ? act("Remove", "X", () => remove([shot], heading)) : null,
  ];
  const text = [
    suggested === null ? null : el("p", {}, "All other examples together suggest ", el("strong", { class: "name", title: suggested }, cut(suggested)), "."),
    twin === null ? null : el("p", {}, `The same image is in another class, too (photo ${twin}).`),
    el("p", { class: "source", title: shot.source }, cut(nameOf(shot.source, 2), 40)),
  ];
  return el(
    "li",
    { data: { keyId: shot.key_id, margin: shot.margin } },
    figure(shot.image, shot.source, shot.label, "This photo is labelled"),
    shot.nearest_label && figure(shot.nearest, shot.nearest_source, shot.nearest_label, "The most similar example is labelled"),
    el("div", {}, ...text, el("p", { class: "buttons" }, ...acts)),
  );
}

/** Keys decide about the example that has the focus, or else about the first one. */
addEventListener("keydown", (event) => {
  const { target } = event;
  if (!isFor("check-view", event) || (event.key === "Enter" && target.closest("button, input, a"))) return;
  const one = target.closest("#audit li") ?? $("audit").firstElementChild;
  const act = [...(one?.querySelectorAll("button") ?? [])].find(({ dataset }) => dataset.key.toLowerCase() === event.key.toLowerCase());
  if (!act) return;
  event.preventDefault();
  act.click();
});

// --- history ---

const past = new Part("history", fetchHistory, (versions) => showHistory(versions, changed));

// --- all screens ---

/** Load the parts of a screen that show another index or version. Return false if there is no such screen. */
export function showScreen(view) {
  const parts = { classes: [classes, audit, shots], check: [audit], map: [map], history: [past], settings: [] }[view];
  if (view === "map") showStar();
  if (view === "settings") showAbout();
  for (const part of parts ?? []) part.follow();
  return Boolean(parts);
}

const typed = debounced(250, () => shots.load());
$("shots-class").addEventListener("input", typed);
$("shots-source").addEventListener("input", typed);
$("classes-filter").addEventListener("input", () => classes.load());
$("classes-all").addEventListener("click", () => ((allCards = true), classes.load()));
$("classes-edit").addEventListener("click", ({ target }) => {
  target.ariaPressed = String($("classes-list").classList.toggle("edited"));
});
for (const [id, by] of [["map-closer", 1.5], ["map-farther", 1 / 1.5], ["map-whole", 0]])
  $(id).addEventListener("click", () => keyMap.zoom(by));

state.addEventListener("index", () => {
  for (const id of ["classes-filter", "shots-class", "shots-source"]) $(id).value = "";
  suspects = listed = [];
  mapped = drawn = null;
  keyMap.clear();
  allCards = false;
  $("audit-next").hidden = true;
  grid.show([]); // each index has its own key ids
  $("shots-mapped").hidden = true;
  $("classes-list").parentNode.hidden = false;
  $("tab-check-count").textContent = "";
});
state.addEventListener("version", () => showScreen(location.hash.slice(1)));
