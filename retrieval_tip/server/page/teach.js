// The Teach view, which creates a classifier from photos in named classes, or adds them to the open classifier.

import { judged } from "./accuracy.js";
import * as api from "./api.js";
import * as camera from "./camera.js";
import { $, el, failure, plural, preview } from "./dom.js";
import { chosen } from "./files.js";
import { notice } from "./notice.js";
import { state } from "./state.js";

const FIRST = 48; // number of photos in the request that creates an index
const SHOWN = 12; // number of thumbnails per class
const IMAGE = /\.(jpe?g|png|webp|hei[cf])$/i;

const classes = []; // { name, files, element }
let running = null; // aborts the upload

const photos = () => classes.reduce((sum, one) => sum + one.files.length, 0);
const isNew = () => $("teach-new").checked;

function addClass(name = "", files = []) {
  const one = { name, files: [] };
  const input = el("input", { type: "text", value: name, placeholder: "class name", autocomplete: "off", aria: { label: "Class name" } });
  input.setAttribute("list", "class-names");
  input.addEventListener("input", () => ((one.name = input.value.trim()), show()));
  const pick = el("input", { type: "file", accept: "image/jpeg,image/png,image/webp,.heic,.heif", multiple: true, hidden: true, aria: { label: "Photos" } });
  pick.addEventListener("change", () => (give(one, [...pick.files]), (pick.value = "")));
  const choose = el("button", { type: "button", onclick: () => pick.click() }, "Choose");
  const shot = () => camera.open((file) => give(one, [file]), one.name || "this class").catch((error) => notice(error.message));
  const shoot = el("button", { type: "button", hidden: !camera.hasCamera, onclick: shot }, "Camera");
  const removed = () => {
    takeAway(one);
    if (!classes.length) addClass();
    show();
    $("teach-more").focus();
  };
  const away = el("button", { type: "button", class: "quiet", aria: { label: "Remove this class" }, onclick: removed }, "×");
  one.pictures = el("div", { class: "pictures" });
  one.count = el("span", { class: "hint" });
  one.input = input;
  one.element = el(
    "li",
    { class: "class-card" },
    el("p", { class: "buttons" }, input, away),
    one.pictures,
    el("p", { class: "buttons" }, one.count, choose, shoot, pick),
  );
  classes.push(one);
  $("teach-classes").append(one.element);
  give(one, files);
  return one;
}

function takeAway(one) {
  classes.splice(classes.indexOf(one), 1);
  one.element.remove();
}

function give(one, files) {
  one.files.push(...files);
  draw(one, files);
  show();
}

/** Show files on the card of a class if there is room for them. */
function draw(one, files) {
  const room = SHOWN - one.pictures.children.length;
  for (const file of files.slice(0, Math.max(0, room))) {
    one.pictures.append(preview(file, ""));
  }
}

/** Return the class for single photos that are dropped on an element. If the element is not part of a card, this is the
 *  first empty class. */
const targetAt = (place) =>
  classes.find(({ element }) => element.contains(place)) ?? classes.find(({ files }) => !files.length);

/** While single photos are dragged, mark the class that they would be added to. Pass null to remove the mark. */
export function aim(event) {
  const loose = event && [...event.dataTransfer.items].some(({ type }) => type); // a folder has no type
  const target = loose ? targetAt(event.target) : null;
  for (const one of classes) one.element.classList.toggle("target", one === target);
}

/** Add files that were selected, or dropped on an element. Each folder becomes a class, regardless of where it is
 *  dropped. */
export function receive(found, place = null) {
  showCards();
  const images = found.filter(({ file }) => IMAGE.test(file.name) || IMAGE.test(file.type.replace("/", ".")));
  const before = new Set(classes);
  const given = [];
  for (const [folder, some] of Map.groupBy(images, (one) => one.folder)) {
    const files = some.map(({ file }) => file);
    const known = folder === null ? targetAt(place) : classes.find(({ name }) => name === folder);
    const one = known ?? addClass(folder ?? "");
    give(one, files);
    given.push([one, new Set(files)]);
  }
  const empty = classes.filter(({ name, files }) => !name && !files.length);
  if (images.some(({ folder }) => folder !== null)) empty.forEach(takeAway);
  show();
  const other = found.length - images.length;
  const skipped = other ? `Skipped ${plural(other, "file")} because only JPEG, PNG, WebP and HEIC are supported.` : "";
  if (!images.length) return notice(skipped);
  notice(`Added ${plural(images.length, "photo")} to ${plural(given.length, "class", "classes")}. ${skipped}`, () => {
    for (const [one, files] of given) takeBack(one, files, before.has(one));
    while (classes.length < 2) addClass();
    show();
    return "Undone.";
  });
}

/** Remove files from a class. If the class is then empty, also remove the class, unless `stays` is true. */
function takeBack(one, files, stays) {
  if (!classes.includes(one)) return;
  one.files = one.files.filter((file) => !files.has(file));
  if (!stays && !one.files.length) return takeAway(one);
  one.pictures.replaceChildren();
  draw(one, one.files);
}

function show() {
  for (const one of classes) one.count.textContent = one.files.length ? plural(one.files.length, "photo") : "Drop photos here";
  const full = classes.filter((one) => one.files.length);
  const unnamed = full.find((one) => !one.name);
  const twice = full.length !== new Set(full.map((one) => one.name)).size;
  const few = isNew() ? 2 : 1;
  const name = $("teach-name").value.trim();
  $("teach-name-label").hidden = !isNew();
  let missing = "";
  if (!state.mayChange) missing = "This server is read-only. Restart it with --token.";
  else if (full.length < few) missing = isNew() ? "Add photos to at least two classes. Five photos per class are a good start." : "Add photos to a class.";
  else if (unnamed) missing = "Each class needs a name.";
  else if (twice) missing = "Two classes have the same name.";
  else if (isNew() && !name) missing = "The classifier needs a name.";
  $("teach-missing").textContent = missing;
  $("teach-go").disabled = Boolean(missing) || running !== null;
  const of = full.length ? ` ${plural(photos(), "photo")} in ${plural(full.length, "class", "classes")}` : "";
  $("teach-go").textContent = isNew() ? `Create classifier${of && ` from${of}`}` : `Add${of || " photos"}`;
}

/** Return the files for the first request, which include some of every class, and the remaining files by class. */
function begun() {
  const first = [];
  const left = new Map();
  const full = classes.filter((one) => one.files.length);
  for (let i = 0; full.some((one) => one.files.length > i); i++)
    for (const one of full) {
      const file = one.files[i];
      if (!file) continue;
      if (first.length < FIRST || i === 0) first.push([one.name, file]);
      else left.set(one.name, [...(left.get(one.name) ?? []), file]);
    }
  return [first, left];
}

async function go() {
  notice("");
  running = new AbortController();
  const { signal } = running;
  const total = photos();
  const started = performance.now();
  let sent = 0;
  const report = (text) => {
    signal.throwIfAborted();
    $("teach-progress").value = sent / total;
    $("teach-said").textContent = text;
  };
  $("teach-working").hidden = false;
  $("teach-result").hidden = true;
  show();
  const skipped = [];
  let since = null;
  try {
    report(`Uploading ${plural(total, "photo")}…`);
    let rest;
    let result;
    if (isNew()) {
      const [first, left] = begun();
      rest = left;
      result = await state.make($("teach-name").value.trim(), first);
      if (!result) return;
      skipped.push(...result.skipped);
      sent = first.length;
    } else {
      since = state.info.version;
      rest = new Map(classes.filter((one) => one.files.length).map((one) => [one.name, one.files]));
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
      sent = before + files.length;
    }
    if (rest.size) {
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
    $("teach-result").replaceChildren(el("p", {}, what, kept, sent ? undoTo(since) : null));
  } finally {
    running = null;
    $("teach-working").hidden = true;
    show();
  }
}

/** Return a button that restores version `since`, or null if there is no such version. */
function undoTo(since) {
  if (since === null) return null;
  const onclick = async ({ target }) => {
    target.disabled = true;
    try {
      if (await state.rollback(since, state.info.version)) $("teach-result").replaceChildren("Undone.");
      $("teach-view").classList.remove("done");
    } catch (error) {
      $("teach-result").replaceChildren(failure(error));
    }
  };
  return el("button", { type: "button", onclick }, "Undo");
}

/** Show the cards again, in place of the result. */
function showCards() {
  if ($("teach-view").classList.contains("done")) $("teach-result").hidden = true;
  $("teach-view").classList.remove("done");
}

function finished(result, skipped, since, seconds) {
  const names = skipped.slice(0, 3).map(({ input }) => input).join(", ") + (skipped.length > 3 ? ` and ${skipped.length - 3} more` : "");
  const out = skipped.length ? ` Skipped ${plural(skipped.length, "file")}: ${names}.` : "";
  const ask = el("button", { type: "button", class: "primary", id: "teach-ask", onclick: () => (location.hash = "#classify") }, "Try it on a photo");
  const again = el("button", { type: "button", onclick: () => (showCards(), $("teach-more").focus()) }, "Add more photos");
  $("teach-view").classList.add("done"); // the result takes the place of the cards
  $("teach-result").hidden = false;
  $("teach-result").replaceChildren(
    el("strong", {}, `Done in ${seconds.toFixed(1)} s. “${result.index}” is ready.`),
    el("p", {}, `${judged(result.judged) || "To estimate its accuracy, add a second photo to each class."}${out}`),
    el("p", { class: "buttons" }, ask, again, undoTo(since)),
  );
  for (const one of classes.splice(0)) one.element.remove();
  addClass();
  addClass();
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

$("teach-more").addEventListener("click", () => addClass().input.focus());
$("teach-go").addEventListener("click", go);
$("teach-cancel").addEventListener("click", () => {
  running?.abort(new DOMException("cancelled", "AbortError"));
  $("teach-said").textContent = "Stopping after the current upload…";
});
$("teach-folders").addEventListener("click", () => $("teach-folder").click());
$("teach-folder").addEventListener("change", () => (receive(chosen($("teach-folder"))), ($("teach-folder").value = "")));
$("teach-name").addEventListener("input", show);
for (const id of ["teach-new", "teach-old"]) $(id).addEventListener("change", show);
addEventListener("hashchange", () => location.hash === "#teach" || showCards());
$("to-teach").addEventListener("click", () => (($("teach-new").checked = true), show(), $("teach-name").select()));
$("classes-add").addEventListener("click", () => $("teach-old").disabled || (($("teach-old").checked = true), show()));
state.addEventListener("wanted", ({ detail }) => {
  const known = classes.find(({ name }) => name === detail);
  const one = known ?? classes.find(({ name, files }) => !name && !files.length) ?? addClass();
  one.name = one.input.value = detail;
  if (!$("teach-old").disabled) $("teach-old").checked = true;
  show();
  one.input.focus();
});
state.addEventListener("index", follow);
state.addEventListener("indexes", follow);
addClass();
addClass();
follow();
