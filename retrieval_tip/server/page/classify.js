// The photos on the page, with the requests that classify them, their grid, and actions on one or several photos.

import * as api from "./api.js";
import * as drawer from "./drawer.js";
import { $, count, debounced, el, noPreview, percent, plural, preview, say } from "./dom.js";
import { Grid } from "./grid.js";
import { notice } from "./notice.js";
import { Photo, parameters } from "./photo.js";
import { settings } from "./settings.js";
import { state } from "./state.js";
import { showUnknown } from "./unknown.js";
import { classFolder, safe, zip } from "./zip.js";

const BLOCK = 64; // features per request
const STILL = 60; // ms between requests while a slider moves
const DOUBTFUL = 0.95; // below this probability, a tile has a bar

const photos = [];
const refused = new Map(); // names of skipped files by reason
let leaving = new AbortController(); // aborts requests to an index that is no longer open
let moving = new AbortController(); // aborts requests for other settings or for another version

/** Return the open photo, or else the active photo, or else the first photo, or null if there are no photos. */
export const looked = () => drawer.openPhoto() ?? grid.active ?? photos[0] ?? null;

/** Return all photos on the page. */
export const pagePhotos = () => photos;

const grid = new Grid($("grid"), {
  tile,
  opened(photo) {
    open(photo);
    $("drawer").focus({ preventScroll: true });
  },
  chosen: showChosen,
  pressed(event) {
    if (event.key === "Delete") return putAway(acting()), true;
    if (event.key === "Escape" && drawer.openPhoto()) return close(), true;
    if (event.key === "a" && !event.ctrlKey && !event.metaKey) return acceptAll(acting()), true;
    if (!["1", "2", "3"].includes(event.key) || event.ctrlKey || event.metaKey) return false;
    const label = choices()[Number(event.key) - 1];
    if (label && state.info.changes) teach(acting(), label);
    return true;
  },
});

// --- requests ---

async function ask(photo) {
  const { name } = settings;
  const { signal } = leaving;
  photo.busy = true;
  photo.problem = null;
  changed(photo);
  try {
    const answer = await photo.ask(signal, trouble);
    if (answer.version !== state.info.version) await state.refresh();
    signal.throwIfAborted();
    if (!photo.take(answer, answer.results[0], name, []) || name !== settings.name) askAgain([photo]);
  } catch (error) {
    if (error.name !== "AbortError") fail(photo, error);
  }
  changed(photo);
}

function fail(photo, error) {
  photo.busy = false;
  photo.problem = error;
  if (api.passing(error) || photo.feature) return;
  const reason = reasonOf(photo, error);
  refused.set(reason, [...(refused.get(reason) ?? []), photo.name]);
  remove([photo]); // because it will never get an answer
  showProblems();
}

/** Return the reason why a file was skipped. It excludes the file name, so that files with the same reason share a
 *  line. */
function reasonOf({ name }, { message }) {
  const reason = message.startsWith(`${name}: `) ? message.slice(name.length + 2) : message;
  if (!/not a readable image/.test(reason)) return reason;
  if (/\.hei[cf]$/i.test(name)) return "the server cannot open HEIC files; save as JPEG, or install the extra heic on the server";
  return "the file is damaged, or is not a JPEG, PNG or WebP image";
}

/** Classify photos again by their features. If a photo is one of the examples, it is classified without itself. */
async function askAgain(asked) {
  const first = new Set(grid.items.slice(0, 60));
  const ordered = [...asked].sort((a, b) => first.has(b) - first.has(a)); // these are probably visible
  for (const photo of asked) photo.busy ||= !photo.current;
  const blocks = [];
  for (const some of Map.groupBy(ordered, ({ current, without }) => current && without.join()).values())
    for (let i = 0; i < some.length; i += BLOCK) blocks.push(some.slice(i, i + BLOCK));
  await Promise.all(blocks.map(askBlock));
}

/** Classify photos again that leave out the same examples. */
async function askBlock(block) {
  const { name } = settings;
  const [{ current, without: itself }] = block;
  const without = current ? itself : [];
  const signal = AbortSignal.any([moving.signal, leaving.signal]);
  try {
    const asked = { ...parameters(), without, features: !current };
    const answer = await api.classifyFeatures(block.map(({ feature }) => feature), asked, { signal, waiting: trouble });
    if (answer.version !== state.info.version) await state.refresh();
    signal.throwIfAborted(); // a newer request has been sent, and its answer may have arrived
    const again = block.filter((photo, i) => !photo.take(answer, answer.results[i], name, without));
    askAgain(again.filter(({ gone }) => !gone.signal.aborted));
  } catch (error) {
    if (error.name === "AbortError") return;
    for (const photo of block) fail(photo, error);
  }
  block.forEach(changed);
}

/** Add files at the top of the page. They wait until an index is open. If files are images of shots, `keyIds` contains
 *  the key ids of these shots. */
export function addFiles(files, keyIds = []) {
  const added = files.map((file, i) => new Photo(file, keyIds[i]));
  photos.unshift(...added);
  if (state.info) added.forEach(begin);
  arrange();
  if (added.length === 1 && photos.length === 1) open(added[0]);
}

function begin(photo) {
  photo.forget();
  if (state.info.images) ask(photo);
  else photo.problem = new api.Problem("This classifier accepts features, not photos.");
}

// --- display ---

const redraw = new Set();
let frame = 0;

function changed(photo) {
  redraw.add(photo);
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => {
    for (const one of redraw) grid.redraw(one);
    redraw.clear();
    progress();
  });
}

const busy = () => photos.filter((photo) => photo.busy).length;
let wasBusy = false;
let work = { begun: 0, most: 0 }; // when photos began to wait for answers, and how many there were

/** Return how long the photos that have no answer yet will take, or "" at the beginning. */
function remaining(left) {
  if (left > work.most || !wasBusy) work = { begun: performance.now(), most: left };
  const done = work.most - left;
  const seconds = (performance.now() - work.begun) / 1000;
  if (done < 5 || seconds < 3) return "";
  return ` · about ${Math.ceil((seconds * left) / done)} s left`;
}

function progress() {
  const left = busy();
  $("classify-view").classList.toggle("some", photos.length > 0);
  $("start").hidden = photos.length > 0;
  $("answers").hidden = !photos.length;
  const unlike = photos.filter((photo) => photo.unlike).length;
  $("progress").textContent =
    (left ? `${count(photos.length - left)} of ${plural(photos.length, "photo")} done${remaining(left)}` : plural(photos.length, "photo")) +
    (unlike ? ` · ${unlike} with no match` : "");
  const done = wasBusy && !left;
  wasBusy = left > 0;
  if (done) {
    arrange();
    const [first] = grid.items;
    if (first?.shown && photos.length === 1) say(`${first.name}: ${spoken(first)}`);
    else if (first) say(`${plural(photos.length, "photo")} classified. First: ${first.name}, ${first.shown ? spoken(first) : ""}`);
  }
  if (!left) showUnknown(photos, teach);
  drawer.show();
  showProblems();
}

const spoken = (photo) => (photo.unlike ? "no match" : `${photo.winner.label}, ${percent(photo.winner.probability)}`);

let lasting = "";
/** Show that the server is busy. The message appears once, and not for each photo. */
function trouble(problem) {
  lasting = api.retrying(problem);
  showProblems();
}

/** Show one line for each kind of problem, regardless of how many files have it. */
function showProblems() {
  const lines = [];
  const failed = photos.filter((photo) => photo.problem && api.passing(photo.problem));
  if (failed.length) {
    const retry = () => {
      askAgain(failed.filter(({ feature }) => feature));
      failed.filter(({ feature }) => !feature).forEach(ask);
    };
    const again = el("button", { type: "button", id: "again", onclick: retry }, "Try again");
    const without = failed.filter((photo) => !photo.shown).length;
    lines.push([`${failed[0].problem.message}${without ? ` ${plural(without, "photo has", "photos have")} not been classified yet.` : ""}`, again]);
  } else if (lasting && busy()) lines.push([lasting]);
  if (!busy()) lasting = "";
  for (const [reason, names] of refused) {
    const onclick = () => (refused.delete(reason), showProblems());
    const close = el("button", { type: "button", class: "quiet", aria: { label: "Dismiss" }, onclick }, "×");
    const some = names.slice(0, 4).join(", ") + (names.length > 4 ? ` and ${names.length - 4} more` : "");
    lines.push([`Skipped ${plural(names.length, "file")} (${reason}): ${some}`, close]);
  }
  const other = photos.find((photo) => photo.problem && !api.passing(photo.problem));
  if (other) lines.push([other.problem.message]);
  const shown = lines.map(([text]) => text).join("\n");
  if ($("troubles").dataset.shown === shown) return;
  $("troubles").dataset.shown = shown;
  $("troubles").replaceChildren(...lines.map((parts) => el("p", {}, el("span", {}, parts[0]), ...parts.slice(1))));
}

function tile(photo, element) {
  if (!element) {
    const tick = el("span", { class: "tick", aria: { hidden: "true" } }, "✓");
    element = el("div", {}, el("span", { class: "frame" }, preview(photo.file, "", noPreview()), tick), el("span", { class: "said" }), el("span", { class: "chip-of" }));
  }
  const said = element.children[1];
  const chip = element.children[2];
  const { shown, winner } = photo;
  element.classList.toggle("busy", photo.busy);
  element.classList.toggle("unlike", photo.unlike && !photo.taught);
  element.classList.toggle("taught", photo.taught !== null);
  element.title = photo.name;
  Object.assign(element.dataset, { input: photo.name, busy: photo.busy });
  if (shown) Object.assign(element.dataset, { label: winner.label, probability: winner.probability });
  said.textContent = photo.taught ?? (photo.unlike ? "No match" : (winner?.label ?? photo.name));
  if (photo.taught) chip.textContent = "added";
  else if (shown) chip.textContent = photo.unlike ? "" : percent(winner.probability);
  else chip.textContent = photo.problem ? "no answer" : "classifying…";
  const doubtful = shown && !photo.unlike && !photo.taught && winner.probability < DOUBTFUL;
  element.style.setProperty("--p", doubtful ? winner.probability : 0);
  return element;
}

// --- sorting, grouping, filtering ---

const STATES = {
  all: () => true,
  unlike: (photo) => photo.unlike && !photo.taught,
  unsure: (photo) => photo.shown && !photo.unlike && photo.winner.probability < 0.5,
  taught: (photo) => photo.taught !== null,
};
const SORTS = {
  doubt: (a, b) => (a.taught !== null) - (b.taught !== null) || b.doubt - a.doubt,
  sure: (a, b) => a.doubt - b.doubt,
  name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  new: () => 0,
  like: (a, b) => likeness(b) - likeness(a),
};
let example = null; // the other photos are compared to this photo
const likeness = (photo) => (example?.feature && photo.feature ? photo.feature.reduce((sum, x, i) => sum + x * example.feature[i], 0) : -1);

/** Sort the photos by their similarity to this photo. */
function moreLike(photo) {
  example = photo;
  $("sort-like").hidden = false;
  $("sort-like").textContent = `Similar to ${photo.name}`;
  $("sort").value = "like";
  arrange();
  scrollTo({ top: 0 });
}

const classOf = (photo) => photo.taught ?? (photo.unlike ? "" : (photo.winner?.label ?? ""));

function arrange() {
  const wanted = $("filter").value.trim().toLowerCase();
  const is = STATES[$("filter-state").value];
  const kept = photos.filter(
    (photo) => is(photo) && (!wanted || `${classOf(photo)}\n${photo.name}`.toLowerCase().includes(wanted)),
  );
  const found = busy() ? kept : kept.sort(SORTS[$("sort").value]); // photos keep their places while answers arrive
  let groups = [{ label: null, items: found }];
  if ($("group").checked) {
    const byClass = Map.groupBy(found, classOf);
    const names = [...byClass.keys()].sort((a, b) => (b === "") - (a === "") || a.localeCompare(b));
    groups = names.map((name) => ({ label: name || "No match", items: byClass.get(name) }));
  }
  grid.show(groups);
  $("nothing").hidden = found.length > 0 || !photos.length;
  showChosen();
  progress();
}

$("filters").addEventListener("click", () => {
  const open = $("bar").classList.toggle("open");
  $("filters").setAttribute("aria-expanded", String(open));
});
for (const id of ["sort", "group", "filter-state"]) $(id).addEventListener("change", arrange);
$("filter").addEventListener("input", debounced(120, arrange));

// --- one photo ---

function open(photo) {
  drawer.open(photo);
  grid.go(photo);
}

function close() {
  drawer.close();
  grid.show(grid.groups);
  $("grid").focus();
}

drawer.setUp({
  teach: (which, label) => teach(which, label),
  like: moreLike,
  close,
  step(by) {
    const next = grid.items[grid.items.indexOf(drawer.openPhoto()) + by];
    if (next) open(next);
  },
});

// --- several photos ---

const acting = () => (grid.selected.size ? grid.items.filter((photo) => grid.selected.has(photo)) : grid.active ? [grid.active] : []);

/** Return three classes to suggest for the selected photos. They have the highest total probability, and exclude the
 *  class that all of these photos already have. */
function choices() {
  const some = acting();
  if (some.length === 1) return some[0].choices;
  const sums = new Map();
  for (const { shown } of some) for (const { label, probability } of shown?.rows ?? []) sums.set(label, (sums.get(label) ?? 0) + probability);
  const agreed = new Set(some.map(classOf)).size === 1 ? classOf(some[0]) : null;
  return [...sums].filter(([label]) => label !== agreed).sort((a, b) => b[1] - a[1]).slice(0, 3).map(([label]) => label);
}

function showChosen() {
  const number = grid.selected.size;
  $("selection").hidden = !number;
  $("selection-count").textContent = `${number} selected`;
  const can = state.info?.changes ?? false;
  $("selection-form").hidden = !can;
  $("selection-right").hidden = !can || !acting().some(acceptable);
  $("selection-chips").replaceChildren(
    ...(can && number ? choices() : []).map((label, i) =>
      el("button", { type: "button", class: "chip", onclick: () => teach(acting(), label) }, el("kbd", {}, `${i + 1}`), ` ${label}`),
    ),
  );
}

$("selection-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const label = $("selection-label").value.trim();
  if (label) teach(acting(), label);
  $("selection-label").value = "";
});
$("selection-right").addEventListener("click", () => acceptAll(acting()));
$("selection-none").addEventListener("click", () => (grid.select([]), $("grid").focus()));
$("selection-away").addEventListener("click", () => (putAway(acting()), $("grid").focus()));

const acceptable = (photo) => photo.shown && !photo.unlike && photo.taught === null && !photo.judgedByOthers;

/** Add each photo as an example of its answer, and offer to undo this. */
async function acceptAll(which) {
  if (!state.info.changes) return;
  const since = state.info.version;
  const some = which.filter(acceptable);
  for (const [label, own] of Map.groupBy(some, ({ winner }) => winner.label)) {
    if (!(await teach(own, label))) return;
  }
  if (some.length) offerUndo(`Added ${plural(some.length, "example photo")} to the classes of their answers.`, some, since);
}

/** Show a notice that can restore a version. */
function offerUndo(text, which, since) {
  const now = state.info.version;
  notice(text, async () => {
    const undone = await state.rollback(since, now);
    if (!undone) return false;
    for (const photo of which) photo.taught = null;
    arrange();
    return "Undone.";
  });
}

/** Add photos as examples of a class, and offer to undo this. Return whether they were added. */
async function teach(which, label) {
  if (!which.length) return;
  notice("Adding…");
  try {
    const report = (done) => which.length > 16 && notice(`Adding ${done} of ${which.length}…`);
    for (const photo of which) photo.taught = label;
    const added = await state.add(label, which.map((photo) => photo.file), report);
    if (!added) {
      for (const photo of which) photo.taught = null;
      return notice("");
    }
    grid.select([]);
    arrange();
    if (!added.key_ids.length) return notice(`Nothing was added, because ${label} already has ${added.known === 1 ? "this example" : "these examples"}.`);
    const to = added.classes.length ? `the new class ${label}` : label;
    const alike = added.warnings.map((line) => ` ${line.split("; to merge")[0]}.`).join("");
    const twins = added.duplicates.length ? ` Please check: ${added.duplicates.join("; ")}` : "";
    offerUndo(`Added ${plural(added.key_ids.length, "example photo")} to ${to}.${alike}${twins}`, which, added.since);
    return true;
  } catch (error) {
    for (const photo of which) photo.taught = null;
    arrange();
    notice(error.message);
  }
}

function remove(which) {
  const gone = new Set(which);
  for (const photo of gone) photo.gone.abort();
  for (let i = photos.length - 1; i >= 0; i--) if (gone.has(photos[i])) photos.splice(i, 1);
  if (gone.has(drawer.openPhoto())) drawer.close();
  arrange();
}

function putAway(which) {
  const at = Math.min(...which.map((photo) => grid.items.indexOf(photo)));
  remove(which);
  if (photos.length) grid.go(grid.items[Math.min(at, grid.items.length - 1)]);
  else $("choose").focus();
}

// --- download ---

/** Return the answers, as one row per photo. */
const rows = () =>
  grid.items
    .filter(({ shown }) => shown)
    .map((photo) => ({
      input: photo.name,
      label: photo.winner.label,
      probability: photo.winner.probability,
      unlike: photo.unlike,
      taught: photo.taught,
      labels: photo.shown.rows.map(({ label }) => label),
      probabilities: photo.shown.rows.map(({ probability }) => probability),
    }));

/** Return a CSV cell. A leading quote prevents spreadsheets from evaluating text as a formula. */
function cell(value) {
  const text = value === null ? "" : String(value);
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function download(name, type, ...parts) {
  const url = URL.createObjectURL(new Blob(parts, { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

$("download-csv").addEventListener("click", () => {
  const columns = ["input", "label", "probability", "unlike", "taught"];
  const lines = [columns, ...rows().map((row) => columns.map((name) => row[name]))];
  download(`${state.info.name}.csv`, "text/csv", `${lines.map((line) => line.map(cell).join(",")).join("\n")}\n`);
});
$("download-json").addEventListener("click", () =>
  download(`${state.info.name}.json`, "application/json", `${JSON.stringify(rows(), null, 1)}\n`),
);

const SURE = 0.5; // below this probability, an answer is more likely wrong than right
function folderOf({ taught, unlike, winner }) {
  if (taught === null && unlike) return "no match";
  if (taught === null && winner.probability < SURE) return "not sure";
  return classFolder(taught ?? winner.label);
}

/** Return the path of each photo in the folder of its class. If a path is taken, a number is added. */
function sortedPaths(some) {
  const taken = new Set();
  return some.map((photo) => {
    const [, stem, suffix] = /^(.*?)(\.[^.]*)?$/s.exec(safe(photo.name));
    for (let number = 1; ; number++) {
      const path = `${folderOf(photo)}/${stem}${number > 1 ? `-${number}` : ""}${suffix ?? ""}`;
      if (taken.has(path.toLowerCase())) continue;
      taken.add(path.toLowerCase());
      return [path, photo.file];
    }
  });
}

$("download-zip").addEventListener("click", async () => {
  const some = grid.items.filter(({ shown }) => shown);
  $("download-zip").disabled = true;
  try {
    const sorted = await zip(sortedPaths(some), (done) => notice(`Packing ${done} of ${some.length}…`));
    download(`${state.info.name}.zip`, "application/zip", sorted);
    notice(`Packed ${plural(some.length, "photo")} into folders by class.`);
  } catch (error) {
    notice(error.message);
  }
  $("download-zip").disabled = false;
});

// --- changes of settings, index and version ---

/** Ask again for all photos that the server has seen, and give up older requests. */
function askAll() {
  moving.abort();
  moving = new AbortController();
  askAgain(photos.filter(({ feature }) => feature));
}

let due = 0;
settings.addEventListener("change", () => {
  due ||= setTimeout(() => ((due = 0), askAll()), STILL);
});

state.addEventListener("index", () => {
  leaving.abort();
  leaving = new AbortController();
  $("choose").disabled = !state.info.images;
  $("drop-hint").textContent = state.info.images
    ? "Drop or paste JPEG, PNG or WebP files anywhere on this page. They are only sent to this server."
    : "This classifier has no encoder on this server. It accepts features (POST /v1/classify), not photos.";
  for (const photo of photos) begin(photo);
  arrange();
});

state.addEventListener("version", () => {
  for (const photo of photos) photo.before = photo.shown;
  askAll();
  progress();
});

$("choose").addEventListener("click", () => $("files").click());
$("more").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  addFiles([...$("files").files]);
  $("files").value = ""; // allows the same file to be selected again
});
$("clear").addEventListener("click", () => putAway([...photos]));
arrange();

