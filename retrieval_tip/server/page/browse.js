// The screens of a classifier: its classes and example photos, labels to check, the map, and the history.

import { estimated, gained, showAccuracy } from "./accuracy.js";
import * as api from "./api.js";
import { looked, pagePhotos } from "./classify.js";
import { confirmed } from "./dialogs.js";
import { $, count, debounced, el, failure, nameOf, percent, picture, plural, refill } from "./dom.js";
import { Grid } from "./grid.js";
import { KeyMap, placeOf } from "./map.js";
import { notice } from "./notice.js";
import { settings } from "./settings.js";
import { state } from "./state.js";

const PAGE = 1000; // examples per request
const MOST = 10_000; // examples to list; the others can be found with the filters
const SUSPECTS = 1000; // suspicious labels to fetch
const ASKED = 500; // key ids per request
const MAPPED = 10_000; // maximum number of examples on the map; if there are more, each class is sampled
const MINUTES = 20 * 60_000; // ms that computing a map may take
const RINGS = 500; // maximum number of new photos on the map
const FEW = 4; // a class that has fewer examples needs more

/** A part of the view whose content is fetched. Its state line shows progress or errors, or tells that it is empty. */
class Part {
  #asked = new AbortController();

  constructor(name, fetchPart, show) {
    this.state = $(`${name}-state`);
    this.fetchPart = fetchPart;
    this.show = show;
  }

  async load() {
    this.#asked.abort(); // so that a late response does not replace a newer one
    this.#asked = new AbortController();
    const { signal } = this.#asked;
    this.state.textContent = "Loading…";
    const waiting = (problem) => (this.state.textContent = api.retrying(problem));
    try {
      const found = await this.fetchPart({ signal, waiting });
      this.state.textContent = this.show(found) ?? "";
    } catch (error) {
      if (error.name !== "AbortError") this.state.replaceChildren(failure(error, () => this.load()));
    }
  }
}

const shotsByKey = new Map(); // examples by key id, which the map shows; cleared with every new version
const loaded = new Map(); // name and version of the index that each part shows

/** Load the parts of a screen that show another index or version. Return false if there is no such screen. */
export function showScreen(view) {
  const parts = { classes: [classes, audit, shots], check: [audit], map: [map], history: [past], settings: [about] }[view];
  if (!parts) return false;
  if (view === "map") showStar();
  for (const part of parts) {
    if (loaded.get(part) === current()) continue;
    loaded.set(part, current());
    part.load();
  }
  return true;
}

const current = () => `${state.info.name} ${state.info.version}`;

const classes = { load: () => (showAccuracy($("index-judged")), showClasses()) };
const about = { load: showAbout };

function showAbout() {
  const { info } = state;
  fill($("about"), {
    name: info.name,
    version: `${info.version} (${info.change}), ${new Date(info.created_at).toLocaleString()}`,
    "example photos": count(info.n_keys),
    classes: count(info.n_classes),
    encoder: info.backbone ?? "none (only features are accepted)",
  });
  fill($("provenance"), {
    dimensions: info.d,
    alpha: rounded(info.alpha),
    beta: rounded(info.beta),
    k: info.k === "all" ? "all" : `${info.k}, ${info.tail ? "with" : "without"} tail`,
    temperature: rounded(info.temperature),
    "logit scale": rounded(info.logit_scale),
    "FAISS index": info.exact_search ? info.index : `${info.index}, approximate`,
    prompts: info.text ? info.templates.join(" · ") || "none (text features were given)" : "none (class names are not used)",
    metric: info.metric === "none" ? null : "within-class",
    values: info.values === "one-hot" ? null : info.values,
    ...info.provenance,
  });
}

const rounded = (value) => Number(value.toPrecision(5)).toLocaleString("en");

function fill(list, facts) {
  const shown = Object.entries(facts).filter(([, value]) => value !== null && value !== "");
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
  list.replaceChildren(...shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, text(value)))));
}

async function showClasses() {
  const { info } = state;
  const [{ exemplars }, accuracy] = await Promise.all([state.exemplars().catch(() => ({ exemplars: [] })), estimated()]);
  if (info !== state.info) return;
  const images = new Map(exemplars.map((one) => [one.class_id, one.image]));
  const weakest = new Map((accuracy?.weakest ?? []).map((one) => [one.label, one]));
  const place = new Map([...weakest.keys()].map((label, i) => [label, i]));
  const doubted = Map.groupBy(listed, ({ label }) => label);
  const wanted = $("classes-filter").value.trim().toLowerCase();
  const found = info.classes
    .filter(({ label }) => label.toLowerCase().includes(wanted))
    .sort((a, b) => (place.get(a.label) ?? Infinity) - (place.get(b.label) ?? Infinity) || 0); // weakest classes first
  $("classes-count").textContent = found.length < info.n_classes ? `${count(found.length)} of ${count(info.n_classes)}` : count(found.length);
  $("classes-add").hidden = !info.changes || !info.images;
  $("classes-hint").hidden = !info.changes;
  const card = (one) => classCard(one, images.get(one.class_id), weakest.get(one.label), doubted.get(one.label)?.length);
  const naming = $("classes-list").querySelector(".naming");
  const named = naming?.parentNode.dataset.label;
  refill($("classes-list"), found.map(card));
  const renamed = naming && [...$("classes-list").children].find(({ dataset }) => dataset.label === named);
  if (renamed) openName(renamed, naming); // the name is being edited
  $("classes-more").textContent = found.length ? "" : "No classes match this filter.";
}

function classCard({ label, keys }, image, weak, doubted) {
  const judged = weak ? `${weak.right} of ${weak.photos} right` : "";
  const needs = [judged, keys < FEW ? "needs more photos" : doubted ? `${doubted} to check` : ""].filter(Boolean).join(", ");
  const button = el(
    "button",
    { type: "button", title: `Example photos of ${label}`, data: { label, keys } },
    picture(image, 240, ""),
    el("span", { class: "name" }, label),
    el("span", { class: "count" }, plural(keys, "photo")),
    el("span", { class: "needs" }, needs),
  );
  button.addEventListener("click", () => {
    $("shots-class").value = label;
    shots.load();
    $("shots-title").scrollIntoView();
    $("shots-title").focus({ preventScroll: true });
  });
  if (!state.info.changes) return el("li", {}, button);
  const act = (text, said, onclick) => el("button", { type: "button", class: "quiet", aria: { label: said }, onclick }, text);
  const other = act("Rename", `Rename ${label}`, () => rename(card, label));
  const wanted = () => {
    location.hash = "#teach";
    state.dispatchEvent(new CustomEvent("wanted", { detail: label }));
  };
  const more = weak || keys < FEW ? act("Add photos", `Add photos of ${label}`, wanted) : null;
  const card = el("li", { draggable: true, data: { label } }, button, el("span", { class: "acts" }, more, other));
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
  for (const one of $("classes-list").querySelectorAll(".target")) one.classList.remove("target");
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

/** Edit the name of a class on its card. If another class already has the new name, the two classes are merged. */
function rename(card, label) {
  const input = el("input", { value: label, required: true, maxLength: 1024, autocomplete: "off", aria: { label: "New name" } });
  input.setAttribute("list", "class-names");
  const [ok, hint] = [el("button", { class: "primary" }), el("span", { class: "hint", role: "status" })];
  const form = el("form", { class: "naming" }, input, hint, ok);
  const isTaken = (name) => name !== label && state.labels.includes(name);
  input.oninput = () => {
    const taken = isTaken(input.value.trim());
    ok.textContent = taken ? "Merge" : "Rename";
    hint.textContent = taken ? `${input.value.trim()} already exists. The two classes will be merged.` : "";
  };
  form.addEventListener("keydown", ({ key }) => key === "Escape" && closeName(form).focus());
  form.addEventListener("focusout", ({ relatedTarget: to }) => to && !form.contains(to) && closeName(form));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const name = input.value.trim();
    closeName(form).focus();
    if (isTaken(name)) await merge(label, name);
    else if (name && name !== label) await changed(`Renamed ${label} to ${name}`, () => state.rename(label, name), $("classes-title"));
  });
  const open = $("classes-list").querySelector(".naming");
  if (open) closeName(open);
  openName(card, form);
  input.oninput();
  input.select();
}

function openName(card, form) {
  card.draggable = false; // otherwise text in the field cannot be selected
  card.append(form);
  form.querySelector("input").focus();
}

/** Close the form on a card, and return the card's button for renaming. */
function closeName(form) {
  const card = form.parentNode;
  form.remove();
  card.draggable = true;
  return card.querySelector(".acts").lastChild;
}

/** Return the elements that describe an example. */
const described = ({ key_id: id, label, source }) => [
  el("strong", { class: "name" }, label),
  el("span", { class: "source", title: source }, nameOf(source)),
  el("span", { class: "hint" }, `photo ${id}`),
];

/** Make a change. Then show its description `what` and its effect on the accuracy, and offer to undo it. */
async function changed(what, change, heading) {
  const before = state.info.version;
  const accuracy = estimated();
  $("problem").replaceChildren();
  try {
    const done = await change();
    if (!done) return;
    grid.select([]);
    const more = notice(`${what}.`, async () => {
      const undone = await state.rollback(before, done.version);
      return undone && "Undone.";
    });
    heading.focus();
    gained(accuracy).then((gain) => gain && more(`${what}.${gain}`));
  } catch (error) {
    $("problem").replaceChildren(failure(error));
  }
}

const examples = (number) => plural(number, "example photo");
const move = (ids, label, heading) =>
  changed(`Moved ${examples(ids.length)} to ${label}`, () => state.relabel(ids, label), heading);

async function remove(some, heading) {
  const [shot] = some;
  const shown = [picture(shot.image, 160, nameOf(shot.source)), el("p", {}, ...described(shot))];
  if (!(await confirmed(`Remove ${examples(some.length)}?`, "You can undo this.", "Remove", { shown }))) return;
  const ids = some.map((one) => one.key_id);
  await changed(`Removed ${examples(ids.length)}`, () => state.remove(ids), heading);
}

const unchangeable = () => (state.info.changes ? "" : "This server is read-only, so you cannot move or remove examples.");

// --- example photos ---

const grid = new Grid($("shots"), {
  tile(shot, element) {
    if (element) return (element.querySelector(".said").textContent = shot.label), element;
    return el(
      "div",
      { data: { keyId: shot.key_id }, title: shot.source },
      el("span", { class: "frame" }, picture(shot.image, 240, ""), el("span", { class: "tick", aria: { hidden: "true" } }, "✓")),
      el("span", { class: "said" }, shot.label),
      el("span", { class: "chip-of" }, nameOf(shot.source)),
    );
  },
  opened: (shot) => grid.select(grid.selected.has(shot) ? [...grid.selected].filter((one) => one !== shot) : [...grid.selected, shot]),
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
$("shots-form").addEventListener("submit", (event) => {
  event.preventDefault();
  move([...grid.selected].map((shot) => shot.key_id), $("shots-label").value.trim(), $("shots-title"));
});
$("shots-remove").addEventListener("click", () => remove([...grid.selected], $("shots-title")));
$("shots-none").addEventListener("click", () => (grid.select([]), $("shots").focus()));

/** Fetch the examples that have these key ids and match `wanted`. */
async function keysOf(ids, wanted, options) {
  const keys = [];
  for (let at = 0; at < ids.length; at += ASKED) {
    const some = { ...wanted, key_id: ids.slice(at, at + ASKED), limit: PAGE };
    keys.push(...(await api.keys(state.info.name, some, options)).keys);
  }
  return keys;
}

const shots = new Part(
  "shots",
  async (options) => {
    const wanted = { label: $("shots-class").value, source: $("shots-source").value, limit: PAGE };
    if (mapped) {
      const keys = await keysOf(mapped, wanted, options);
      return { keys, total: keys.length };
    }
    const found = await api.keys(state.info.name, { ...wanted, offset: 0 }, options);
    while (found.keys.length < Math.min(found.total, MOST)) {
      const { keys } = await api.keys(state.info.name, { ...wanted, offset: found.keys.length }, options);
      if (!keys.length) break;
      found.keys.push(...keys);
    }
    return found;
  },
  ({ total, keys }) => {
    $("shots-count").textContent = count(total);
    const before = new Map(grid.items.map((shot) => [shot.key_id, shot])); // keeping the same objects keeps the selection
    const all = keys.map((shot) => Object.assign(before.get(shot.key_id) ?? { id: `shot-${shot.key_id}` }, shot));
    const groups = [...Map.groupBy(all, ({ label }) => label)].map(([label, items]) => ({ label, items }));
    grid.show(groups.length > 1 ? groups : [{ label: null, items: all }]);
    grid.chosen();
    if (!total) return "No example photos match this filter.";
    return keys.length < total ? `These are the first ${count(keys.length)}. Use the filters to find the others.` : unchangeable();
  },
);

let mapped = null; // key ids selected on the map, or null for all

/** List and select the examples that have these ids. If `ids` is null, list all examples. */
async function listOnly(ids) {
  mapped = ids;
  $("shots-mapped").hidden = !ids;
  if (ids) {
    $("shots-mapped").firstElementChild.textContent = `${plural(ids.length, "photo")} from the map`;
    for (const id of ["shots-class", "shots-source"]) $(id).value = "";
  }
  loaded.set(shots, current()); // so that the screen does not load them as well
  if (ids) location.hash = "#classes";
  await shots.load();
  $("shots-title").scrollIntoView();
  $("shots").focus({ preventScroll: true });
  if (ids) grid.select(grid.items);
}
$("shots-all").addEventListener("click", () => listOnly(null));

const map = new Part(
  "map",
  async (options) => {
    const made = (method, more) => api.map(state.info.name, method, MAPPED, { ...options, ...more });
    if (wished) return made(wished, { patience: MINUTES });
    const axes = await made("pca"); // fast, so it is shown until t-SNE is ready
    if (!axes.methods.includes("tsne")) return axes;
    showMap(axes);
    const waiting = () => (map.state.textContent = "This is a preview. A map that keeps similar photos together is being computed…");
    waiting();
    return made("tsne", { waiting, patience: MINUTES });
  },
  showMap,
);

/** Show a map, and return the text of its state line. */
function showMap(found) {
  $("map-methods").hidden = found.methods.length < 2;
  if ($("map-method").children.length !== found.methods.length) {
    $("map-method").replaceChildren(...found.methods.map((method) => el("option", { value: method }, METHODS[method])));
  }
  $("map-method").value = found.method;
  drawn = found;
  const part = found.key_ids.length < found.total ? `${count(found.key_ids.length)} of ${count(found.total)} photos` : "";
  const explained = found.explained?.map(percent).join(" and ");
  $("map-facts").textContent = [part, explained && `the axes show ${explained} of the variance`].filter(Boolean).join("; ");
  $("map").hidden = !found.key_ids.length;
  $("map-shot").replaceChildren();
  keyMap.show(found);
  showStar();
  return found.key_ids.length ? "" : "There are no example photos yet.";
}

let drawn = null; // the current map
let wished = ""; // the method that the user selected

/** Show the open photo as a star on the map, and the other photos of the page as rings. */
function showStar() {
  const photo = looked();
  const at = (one) => (drawn && one?.current ? placeOf(drawn, one, settings.beta) : null);
  const place = at(photo);
  keyMap.star(place, pagePhotos().slice(0, RINGS).filter((one) => one !== photo).map(at).filter(Boolean));
  const how = drawn?.axes ? "is at the star." : "is not on this map. The star marks the examples that it resembles most.";
  $("map-star").textContent = place ? `★ ${photo.name} ${how}` : "";
}

const METHODS = { tsne: "t-SNE (keeps similar photos together)", pca: "PCA (two principal axes)" };
let pointed = null;
const keyMap = new KeyMap($("map-canvas"), { chosen: pointAt, taken: listOnly, shots: shotsOf, name: (classId) => state.labels[classId] });

async function shotsOf(ids) {
  const { keys } = await api.keys(state.info.name, { key_id: ids, limit: ids.length });
  for (const shot of keys) shotsByKey.set(shot.key_id, shot);
  return keys;
}

async function pointAt(keyId) {
  pointed = keyId;
  const { name } = state.info;
  try {
    if (!shotsByKey.has(keyId)) shotsByKey.set(keyId, (await api.keys(name, { key_id: keyId })).keys[0]);
    const shot = shotsByKey.get(keyId);
    if (pointed === keyId && shot)
      $("map-shot").replaceChildren(picture(shot.image, 320, nameOf(shot.source)), el("p", {}, ...described(shot)));
  } catch (error) {
    if (pointed === keyId) $("map-shot").replaceChildren(failure(error));
  }
}

const audit = new Part(
  "audit",
  async (options) => {
    const { name } = state.info;
    const found = await api.audit(name, { borderline: $("audit-all").checked, limit: SUSPECTS }, options);
    const both = found.shots.flatMap((shot) => [shot.key_id, shot.nearest_key_id]);
    const keys = await keysOf([...new Set(both.filter((id) => id !== null))], {}, options);
    return { ...found, images: new Map(keys.map((shot) => [shot.key_id, shot.image])) };
  },
  ({ shots: all, images }) => {
    suspects = all.map((shot) => ({
      ...shot,
      suggested: shot.suggested === shot.label ? null : shot.suggested, // the same image is also in another class
      image: images.get(shot.key_id),
      nearest: images.get(shot.nearest_key_id),
    }));
    showSuspects();
    showClasses();
    return $("audit-state").textContent;
  },
);

let suspects = [];
let listed = [];
const KEPT = "retrieval-tip kept"; // for all indexes, so that renamed indexes and copies have the same marks
const kept = () => new Set(JSON.parse(localStorage.getItem(KEPT) ?? "[]"));
const sourceAndLabel = (shot) => JSON.stringify([shot.source, shot.label]);

function keep(some) {
  localStorage.setItem(KEPT, JSON.stringify([...kept(), ...some.map(sourceAndLabel)]));
  showSuspects();
  showClasses();
  $("audit-title").focus();
}

/** List the suspicious examples that the user has not chosen to keep. */
function showSuspects() {
  const known = kept();
  listed = suspects.filter((shot) => !known.has(sourceAndLabel(shot)));
  $("audit-count").textContent = $("tab-check-count").textContent = count(listed.length);
  refill($("audit"), listed.map(suspicious));
  const movable = listed.filter((shot) => shot.suggested !== null);
  $("audit-bulk").hidden = listed.length < 2 || !state.info.changes;
  $("audit-move-all").textContent = `Accept all ${movable.length}`;
  $("audit-move-all").hidden = !movable.length;
  $("audit-state").textContent = listed.length ? "" : $("audit-all").checked ? "No suspicious labels were found." : "No clear mistakes were found.";
}

/** Accept all suggestions, in one new version. */
function moveAll() {
  const movable = listed.filter((shot) => shot.suggested !== null);
  const byClass = Map.groupBy(movable, (shot) => shot.suggested);
  const moves = [...byClass].map(([label, some]) => ({ label, key_ids: some.map((shot) => shot.key_id) }));
  return changed(`Corrected ${plural(movable.length, "label")}`, () => state.relabelAll(moves), $("audit-title"));
}
$("audit-all").addEventListener("change", () => audit.load());
$("audit-move-all").addEventListener("click", moveAll);
$("audit-keep-all").addEventListener("click", () => keep(listed));
$("audit-remove-all").addEventListener("click", () => remove(listed, $("audit-title")));

function suspicious(shot) {
  const figure = (url, source, label, caption) => {
    const texts = el("figcaption", {}, el("span", { class: "hint" }, caption), el("span", { class: "name" }, label));
    return el("figure", {}, picture(url, 240, nameOf(source)), texts);
  };
  const { suggested, duplicate_of: twin } = shot;
  const act = (text, key, onclick) => {
    const aria = { label: `${text}: photo ${shot.key_id}, ${shot.label}`, keyshortcuts: key };
    return el("button", { type: "button", data: { key }, aria, onclick }, `${text} `, el("kbd", {}, key));
  };
  const heading = $("audit-title");
  const { changes } = state.info;
  return el(
    "li",
    { data: { keyId: shot.key_id, margin: shot.margin } },
    figure(shot.image, shot.source, shot.label, "labelled"),
    figure(shot.nearest, shot.nearest_source ?? "", shot.nearest_label ?? "–", "closest example"),
    el(
      "div",
      {},
      suggested === null ? null : el("p", {}, "Should this be ", el("strong", { class: "name" }, suggested), "?"),
      el("p", { class: "source", title: shot.source }, nameOf(shot.source, 2)),
      twin === null ? null : el("p", { class: "hint" }, `This is the same image as photo ${twin}.`),
      el(
        "p",
        { class: "buttons" },
        changes && suggested !== null ? act(`Change to ${suggested}`, "Enter", () => move([shot.key_id], suggested, heading)) : null,
        act("Keep", "K", () => keep([shot])),
        changes ? act("Remove", "X", () => remove([shot], heading)) : null,
      ),
    ),
  );
}

/** Keys decide about the example that has the focus, or else about the first one. */
addEventListener("keydown", (event) => {
  const { target } = event;
  if ($("check-view").hidden || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open], :popover-open")) return;
  if (event.key === "Enter" && target.closest("button, input, a")) return;
  const one = target.closest("#audit li") ?? $("audit").firstElementChild;
  const button = [...(one?.querySelectorAll("button") ?? [])].find(({ dataset }) => dataset.key.toLowerCase() === event.key.toLowerCase());
  if (!button) return;
  event.preventDefault();
  button.click();
});

// --- history ---

const ago = (time) => {
  const seconds = Math.max(0, (Date.now() - new Date(time)) / 1000);
  const units = [[86_400, "day"], [3600, "hour"], [60, "minute"]];
  for (const [size, unit] of units) if (seconds >= size) return `${plural(Math.floor(seconds / size), unit)} ago`;
  return "just now";
};

const past = new Part(
  "history",
  () => api.history(state.info.name),
  ({ versions }) => {
    $("history").replaceChildren(
      ...versions.toReversed().map(({ version, change, created_at: at, keys, classes, current }) => {
        const call = () => state.rollback(version, state.info.version);
        const onclick = () => changed(`Restored version ${version}`, call, $("history-title"));
        const back = el("button", { type: "button", class: "quiet", onclick }, "Restore");
        return el(
          "li",
          {},
          el("strong", {}, `version ${version}`),
          el("span", { class: "name" }, change),
          el("span", { class: "hint", title: new Date(at).toLocaleString() }, `${plural(keys, "photo")}, ${plural(classes, "class", "classes")}, ${ago(at)}`),
          current || !state.info.changes ? el("span", { class: "hint" }, current ? "current" : "") : back,
        );
      }),
    );
    return "";
  },
);

const typed = debounced(250, () => shots.load());
$("shots-class").addEventListener("input", typed);
$("shots-source").addEventListener("input", typed);
$("classes-filter").addEventListener("input", showClasses);
$("map-method").addEventListener("change", () => ((wished = $("map-method").value), map.load()));
for (const [id, by] of [["map-closer", 1.5], ["map-farther", 1 / 1.5], ["map-whole", 0]])
  $(id).addEventListener("click", () => keyMap.zoom(by));

state.addEventListener("index", () => {
  for (const id of ["classes-filter", "shots-class", "shots-source"]) $(id).value = "";
  grid.show([]); // each index has its own key ids
  suspects = listed = [];
  mapped = drawn = null;
  shotsByKey.clear();
  wished = "";
  $("shots-mapped").hidden = true;
  $("map-method").replaceChildren();
  $("tab-check-count").textContent = "";
});
state.addEventListener("version", () => {
  shotsByKey.clear();
  showScreen(location.hash.slice(1));
});
