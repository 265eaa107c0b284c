// The Teach view, which creates a classifier from photos in named classes, or adds them to the open classifier.

import { judged } from "./accuracy.js";
import { parts } from "./api.js";
import { notice, undoable } from "./dialogs.js";
import { $, button, classField, cross, el, failure, picks, plural, preview } from "./dom.js";
import { state } from "./state.js";

const FIRST = 48; // number of photos in the request that creates an index
const SHOWN = 12; // number of thumbnails per class
const IMAGE = /\.(jpe?g|png|webp|hei[cf])$/i;

const cards = []; // of the classes
let running = null; // aborts the upload

class Card {
  files = [];
  input = classField({ type: "text", placeholder: "class name", aria: { label: "Class name" }, oninput: show });
  count = el("span", { class: "hint" });
  #pictures = el("div", { class: "pictures" });

  constructor(name = "") {
    this.input.value = name;
    const inputs = ["files", "camera-file"].map((id) => $(id).cloneNode());
    const buttons = [button("Choose"), button("Camera", null, { class: "touch" })];
    inputs.forEach((input, i) => (input.removeAttribute("id"), picks(input, (files) => (this.hold([...this.files, ...files]), show()), buttons[i])));
    const remove = () => {
      this.remove();
      if (!cards.length) new Card();
      show();
      $("teach-more").focus();
    };
    this.element = el(
      "li",
      { class: "class-card" },
      el("p", { class: "buttons" }, this.input, cross("Remove this class", remove)),
      this.#pictures,
      el("p", { class: "buttons" }, this.count, ...buttons, ...inputs),
    );
    cards.push(this);
    $("teach-classes").append(this.element);
  }

  get name() {
    return this.input.value.trim();
  }

  get empty() {
    return !this.files.length;
  }

  /** Set the files, and show the first ones. */
  hold(files) {
    this.files = files;
    this.#pictures.replaceChildren(...this.files.slice(0, SHOWN).map((file) => preview(file, "")));
  }

  remove() {
    cards.splice(cards.indexOf(this), 1);
    this.element.remove();
  }
}

const photos = () => cards.reduce((sum, { files }) => sum + files.length, 0);
const full = () => cards.filter(({ empty }) => !empty);
const isNew = () => $("teach-new").checked;

/** Return the card that an element is part of, or else the first empty one. It gets single photos that are dropped. */
const targetAt = (place) => cards.find(({ element }) => element.contains(place)) ?? cards.find(({ empty }) => empty);

/** While single photos are dragged, mark the card that they would be added to. */
export function aim({ dataTransfer, target }) {
  const loose = [...dataTransfer.items].some(({ type }) => type); // a folder has no type
  const aimed = loose ? targetAt(target) : null;
  for (const card of cards) card.element.classList.toggle("target", card === aimed);
}

// --- dropped and selected files ---

/** Return the files of an entry as { file, folder }, excluding hidden files. */
async function filesIn(entry, folder) {
  if (entry.name.startsWith(".")) return [];
  if (entry.isFile) return [{ file: await new Promise((resolve, reject) => entry.file(resolve, reject)), folder }];
  const reader = entry.createReader();
  const hundred = () => new Promise((resolve, reject) => reader.readEntries(resolve, reject));
  const found = [];
  for (let some = await hundred(); some.length; some = await hundred()) found.push(...some);
  const parts = await Promise.all(found.map((one) => filesIn(one, entry.name)));
  return parts.flat();
}

/** Return all files that were dropped or pasted. The entries are only available while the event is handled. */
export async function gather(transfer) {
  const entries = [...(transfer.items ?? [])].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry?.());
  const plain = [...transfer.files];
  if (!entries.some((entry) => entry?.isDirectory)) return plain.map((file) => ({ file, folder: null }));
  const parts = await Promise.all(entries.map((entry, i) => (entry ? filesIn(entry, null) : [{ file: plain[i], folder: null }])));
  return parts.flat();
}

/** Return the files of a selected folder. */
const inFolders = (files) =>
  files
    .filter((file) => !file.name.startsWith("."))
    .map((file) => ({ file, folder: file.webkitRelativePath.split("/").at(-2) ?? null }));

/** Add files that were selected, or dropped on an element. Each folder becomes a class, wherever it is dropped. */
export function receive(found, place = null) {
  showCards();
  const images = found.filter(({ file }) => IMAGE.test(file.name) || IMAGE.test(file.type.replace("/", ".")));
  const before = new Map(cards.map((card) => [card, card.files]));
  const groups = Map.groupBy(images, (one) => one.folder);
  for (const [folder, some] of groups) {
    const known = folder === null ? targetAt(place) : cards.find(({ name }) => name === folder);
    const card = known ?? new Card(folder ?? "");
    card.hold([...card.files, ...some.map(({ file }) => file)]);
  }
  if (images.some(({ folder }) => folder !== null)) for (const card of cards.filter(({ name, empty }) => !name && empty)) card.remove();
  show();
  const other = found.length - images.length;
  const skipped = other ? `Skipped ${plural(other, "file")} because only JPEG, PNG, WebP and HEIC are supported.` : "";
  if (!images.length) return notice(skipped);
  notice(`Added ${plural(images.length, "photo")} to ${plural(groups.size, "class", "classes")}. ${skipped}`, () => {
    for (const card of [...cards]) {
      if (before.has(card)) card.hold(before.get(card));
      else card.remove();
    }
    fillUp();
    show();
    return "Undone.";
  });
}

// --- the classifier ---

function fillUp() {
  while (cards.length < 2) new Card();
}

function show() {
  for (const { files, count } of cards) count.textContent = files.length ? plural(files.length, "photo") : "Drop photos here";
  const names = full().map(({ name }) => name);
  $("teach-name-label").hidden = !isNew();
  let missing = "";
  if (!state.mayChange) missing = "This server is read-only. Restart it with --token.";
  else if (names.length < (isNew() ? 2 : 1)) missing = isNew() ? "Add photos to at least two classes. Five photos per class are a good start." : "Add photos to a class.";
  else if (names.includes("")) missing = "Each class needs a name.";
  else if (names.length !== new Set(names).size) missing = "Two classes have the same name.";
  else if (isNew() && !$("teach-name").value.trim()) missing = "The classifier needs a name.";
  $("teach-missing").textContent = missing;
  $("teach-go").disabled = Boolean(missing) || running !== null;
  const of = names.length ? ` ${plural(photos(), "photo")} in ${plural(names.length, "class", "classes")}` : "";
  $("teach-go").textContent = isNew() ? `Create classifier${of && ` from${of}`}` : `Add${of || " photos"}`;
}

/** Return [label, file] pairs of many classes for the first request, and the remaining photos by class. */
function begun() {
  const most = Math.max(...full().map(({ files }) => files.length));
  const pairs = [];
  for (let i = 0; i < most; i++) for (const { name, files } of full()) if (i < files.length) pairs.push([name, files[i]]);
  const [first] = parts(pairs, FIRST);
  const left = Map.groupBy(pairs.slice(first.length), ([name]) => name);
  return [first, [...left].map(([name, own]) => [name, own.map(([, file]) => file)])];
}

async function go() {
  notice("");
  running = new AbortController();
  const { signal } = running;
  const total = photos();
  const started = performance.now();
  const since = isNew() ? null : state.info.version;
  const skipped = [];
  let sent = 0;
  const report = (text) => {
    signal.throwIfAborted();
    $("teach-progress").value = sent / total;
    $("teach-said").textContent = text;
  };
  $("teach-working").hidden = false;
  $("teach-result").hidden = true;
  show();
  try {
    report(`Uploading ${plural(total, "photo")}…`);
    let rest = full().map(({ name, files }) => [name, files]);
    let result;
    if (isNew()) {
      const [first, left] = begun();
      rest = left;
      result = await state.make($("teach-name").value.trim(), first);
      if (!result) return;
      skipped.push(...result.skipped);
      sent = first.length;
    }
    for (const [label, files] of rest) {
      report(`Uploading ${label}…`);
      const before = sent;
      const added = await state.add(label, files, (done) => {
        sent = before + done;
        report(`Uploading ${label}: ${done} of ${files.length}…`);
      });
      if (!added) return;
      skipped.push(...added.skipped);
    }
    if (rest.length) {
      report("Training…");
      result = await state.fit();
      if (!result) return;
    }
    finished(result, skipped, since, (performance.now() - started) / 1000);
  } catch (error) {
    $("teach-said").textContent = "";
    $("teach-result").hidden = false;
    if (sent) await state.refresh().catch(() => {}); // photos that were uploaded are already in the index
    const what = error.name === "AbortError" ? "Cancelled." : failure(error);
    const kept = sent ? ` ${plural(sent, "photo was", "photos were")} already added. ` : "";
    $("teach-result").replaceChildren(el("p", {}, what, kept));
    if (sent) offerUndo(since);
  } finally {
    running = null;
    $("teach-working").hidden = true;
    show();
  }
}

/** Offer to restore version `since`, if there is one. */
const offerUndo = (since) =>
  since !== null && undoable(`Changed “${state.info.name}”.`, since, state.info.version, () => (showCards(), ($("teach-result").hidden = true)));

function showCards() {
  if ($("teach-view").classList.contains("done")) $("teach-result").hidden = true;
  $("teach-view").classList.remove("done");
}

function finished(result, skipped, since, seconds) {
  const names = skipped.slice(0, 3).map(({ source }) => source).join(", ") + (skipped.length > 3 ? ` and ${skipped.length - 3} more` : "");
  const out = skipped.length ? ` Skipped ${plural(skipped.length, "file")}: ${names}.` : "";
  const ask = button("Try it on a photo", () => (location.hash = "#classify"), { class: "primary", id: "teach-ask" });
  const again = button("Add more photos", () => (showCards(), $("teach-more").focus()));
  $("teach-view").classList.add("done"); // the result takes the place of the cards
  $("teach-result").hidden = false;
  $("teach-result").replaceChildren(
    el("strong", {}, `Done in ${seconds.toFixed(1)} s. “${result.index}” is ready.`),
    el("p", {}, `${judged(result.fit) || "To estimate its accuracy on the examples, add a second photo to each class."}${out}`),
    el("p", { class: "buttons" }, ask, again),
  );
  offerUndo(since);
  for (const card of [...cards]) card.remove();
  fillUp();
  $("teach-old").checked = true; // so that further photos are added to the same classifier
  follow();
  ask.focus();
}

/** Offer to add photos to the open index if it accepts photos. */
function follow() {
  const can = state.info?.images ?? false;
  $("teach-old").disabled = !can;
  $("teach-old-name").textContent = can ? `“${state.info.name}”` : "an existing one";
  if (!can) $("teach-new").checked = true;
  show();
}

$("teach-more").addEventListener("click", () => (new Card().input.focus(), show()));
$("teach-go").addEventListener("click", go);
$("teach-cancel").addEventListener("click", () => {
  running?.abort(new DOMException("cancelled", "AbortError"));
  $("teach-said").textContent = "Stopping after the current upload…";
});
picks($("teach-folder"), (files) => receive(inFolders(files)), $("teach-folders"));
$("teach-name").addEventListener("input", show);
for (const id of ["teach-new", "teach-old"]) $(id).addEventListener("change", show);
addEventListener("hashchange", () => location.hash === "#teach" || showCards());
$("to-teach").addEventListener("click", () => (($("teach-new").checked = true), show(), $("teach-name").select()));
$("classes-add").addEventListener("click", () => $("teach-old").disabled || (($("teach-old").checked = true), show()));
state.addEventListener("wanted", ({ detail }) => {
  const named = cards.find(({ name }) => name === detail);
  const card = named ?? cards.find(({ name, empty }) => !name && empty) ?? new Card();
  card.input.value = detail;
  if (!$("teach-old").disabled) $("teach-old").checked = true;
  show();
  card.input.focus();
});
state.addEventListener("index", follow);
state.addEventListener("indexes", follow);
fillUp();
follow();
