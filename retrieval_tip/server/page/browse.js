// The screens of a classifier: its classes and example photos, labels to check, the map, and the history.

import { gained } from "./accuracy.js";
import * as api from "./api.js";
import { agreed, askName, classForm, reported, undoable } from "./dialogs.js";
import { $, attempt, button, count, cut, debounced, el, isFor, nameOf, picture, plural, refill } from "./dom.js";
import { Grid } from "./grid.js";
import { clear as clearMap, mark as markMap, showMap } from "./map.js";
import { state } from "./state.js";

const MOST = 10_000; // examples to list; the others can be found with the filters
const SUSPECTS = 1000; // suspicious labels to fetch
const ASKED = 500; // key ids per request
const MAPPED = 10_000; // maximum number of examples on the map; if there are more, each class is sampled
const MINUTES = 20 * 60_000; // ms that computing a map may take
const FEW = 4; // a class that has fewer examples needs more
const CARDS = 300; // classes to show; the others can be found by name
const SHOWN = 4; // photos of each version
const WHAT = { added: "Come back:", moved: "Change:", removed: "Go:" };
const hour = new Intl.DateTimeFormat("en", { timeStyle: "short" });
const day = new Intl.DateTimeFormat("en", { dateStyle: "medium" });

/** A part of the view whose content is fetched. Its state line shows progress or errors, or tells that it is empty. */
class Part {
  #asked = new AbortController();
  #version = ""; // name and version of the index that is shown

  constructor(place, fetchPart, show) {
    this.state = el("p", { class: "state", id: `${place.id}-state` });
    place.before(this.state);
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
  const done = await reported(change);
  if (!done) return;
  grid.select([]);
  $("audit-next").hidden = !done.sort;
  $("audit-next").lastElementChild.textContent = done.sort;
  const told = [what, ...(done.warnings ?? [])].join(". ");
  const more = undoable(`${told}.`, before, done.version);
  heading.focus();
  gained(accuracy).then((gain) => gain && more(`${told}.${gain}`));
}

const examples = (number) => plural(number, "example photo");
const move = (some, label, heading) =>
  changed(`Moved ${examples(some.length)} to ${label}`, () => state.relabel(some.map((shot) => [shot.key_id, label])), heading);

const remove = (some, heading) =>
  changed(`Removed ${examples(some.length)}`, () => state.remove(some.map(({ key_id: id }) => id)), heading);

// --- settings ---

function showAbout() {
  const { info } = state;
  const groups = info.levels.length > 1 ? ` Groups: ${info.levels.slice(1).join(", ")}.` : "";
  const made = `Version ${info.version} (${info.change}), ${new Date(info.created_at).toLocaleString()}.`;
  $("about").textContent = `${made} Encoder: ${info.backbone ?? "none (only features are accepted)"}.${groups}`;
}

// --- classes ---

const classes = new Part(
  $("classes-list"),
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
    $("classes-hint").hidden = !info.changes;
    const card = (one) => classCard(one, weakest.get(one.label), doubted.get(one.label)?.length);
    refill($("classes-list"), found.slice(0, CARDS).map(card));
    if (found.length > CARDS) return `These are the first ${CARDS}. Search for the others.`;
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
  return el("li", { data: { label } }, whole, el("span", { class: "acts" }, more, other));
}

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
  kind: ({ label }) => label,
  opened: (shot) => grid.toggle([shot]),
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
classForm($("shots-form"), "Move", () => state.labels, (label) => move([...grid.selected], label, $("shots-title")));
$("shots-remove").addEventListener("click", () => remove([...grid.selected], $("shots-title")));
$("shots-none").addEventListener("click", () => (grid.select([]), $("shots").focus()));

const shots = new Part(
  $("shots"),
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

const map = new Part(
  $("map"),
  async (options) => {
    const made = (method, more) => state.get("/map", { method, limit: MAPPED }, { ...options, ...more });
    const axes = await made("pca"); // fast, so it is shown until t-SNE is ready
    const pictured = await state.pictured();
    if (!axes.methods.includes("tsne")) return [axes, pictured];
    showMap(axes, pictured);
    const waiting = () => (map.state.textContent = "This is a preview. A map that keeps similar photos together is being computed…");
    waiting();
    return [await made("tsne", { waiting, patience: MINUTES }), pictured];
  },
  (found) => showMap(...found),
);
$("map-canvas").addEventListener("taken", ({ detail }) => listOnly(detail));

// --- labels to check ---

const KEPT = "retrieval-tip kept"; // for all indexes, so that renamed indexes and copies have the same marks
const kept = () => new Set(JSON.parse(localStorage.getItem(KEPT) ?? "[]"));
const sourceAndLabel = (shot) => JSON.stringify([shot.source, shot.label]);
let suspects = [];
let listed = []; // the suspects that the user has not chosen to keep

const audit = new Part(
  $("audit"),
  async (options) => {
    const all = await state.get("/audit", { borderline: $("audit-all").checked, limit: SUSPECTS }, options);
    return [all, await state.pictured()];
  },
  ([all, pictured]) => {
    const imageOf = (keyId) => (pictured && keyId !== null ? api.pictureOf(state.info.name, keyId) : null);
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

/** Return the versions of the index, oldest first, with their `changes`. */
async function fetchHistory() {
  const versions = await state.get("/history");
  const changesOf = async (one) => ({ ...one, changes: await state.get(`/history/${one.version}`, { since: one.parent ?? undefined }).catch(() => []) });
  return Promise.all(versions.map(changesOf));
}

/** Show versions, newest first, grouped by day. */
function showHistory(versions) {
  const days = Map.groupBy(versions.toReversed(), (one) => day.format(new Date(one.created_at)));
  const group = ([date, own]) => [el("h3", {}, date), el("ol", { reversed: true }, ...own.map(line))];
  $("history").replaceChildren(...[...days].flatMap(group));
}

function line({ version, change, created_at: at, keys, classes, current, changes }) {
  const photos = changes.flatMap((one) => one.photos).slice(0, SHOWN);
  const call = () => state.rollback(version, state.info.version);
  const restore = async () => (await previewed(version)) && changed(`Restored version ${version}`, call, $("history-title"));
  const facts = `${plural(keys, "photo")}, ${plural(classes, "class", "classes")}`;
  const what = [
    el("p", { class: "name" }, change === "build" ? "created" : change),
    photos.length ? pictures(photos) : null,
    el("p", { class: "hint", title: `version ${version}` }, facts),
  ];
  const action = current ? el("span", { class: "hint" }, "current") : state.info.changes ? button("Restore", restore, { class: "quiet" }) : "";
  return el("li", {}, el("span", { class: "hint" }, hour.format(new Date(at))), el("div", {}, ...what), action);
}

const pictures = (photos) =>
  el("p", { class: "pictures" }, ...photos.map(({ image, label, source }) => picture(image, 112, `${label}: ${nameOf(source)}`)));

/** Show how the photos change if a version is restored. Return whether the user agrees. */
async function previewed(version) {
  const found = await state.get(`/history/${version}`, { since: state.info.version }).catch((error) => error.message);
  const kept = "The current version stays in the history, so you can undo this.";
  const part = ({ what, change, photos }) => [el("p", {}, el("strong", {}, WHAT[what]), ` ${change}`), pictures(photos)];
  const parts = typeof found === "string" ? [el("p", {}, found)] : found.flatMap(part);
  const content = parts.length ? parts : [el("p", {}, "All photos keep their classes.")];
  return agreed("restore", "Restore this version?", [...content, el("p", { class: "hint" }, kept)], "Restore");
}

const past = new Part($("history"), fetchHistory, showHistory);

// --- all screens ---

/** Load the parts of a screen that show another index or version. Return false if there is no such screen. */
export function showScreen(view) {
  const parts = { classes: [classes, audit, shots], check: [audit], map: [map], history: [past], settings: [] }[view];
  if (view === "map") markMap();
  if (view === "settings") showAbout();
  for (const part of parts ?? []) part.follow();
  return Boolean(parts);
}

const typed = debounced(250, () => shots.load());
$("shots-class").addEventListener("input", typed);
$("shots-source").addEventListener("input", typed);
$("classes-filter").addEventListener("input", () => classes.load());

state.addEventListener("index", () => {
  for (const id of ["classes-filter", "shots-class", "shots-source"]) $(id).value = "";
  suspects = listed = [];
  mapped = null;
  clearMap();
  $("audit-next").hidden = true;
  grid.show([]); // each index has its own key ids
  $("shots-mapped").hidden = true;
  $("classes-list").parentNode.hidden = false;
  $("tab-check-count").textContent = "";
});
state.addEventListener("version", () => showScreen(location.hash.slice(1)));
