// Teaching: photographs are dropped onto named classes, and become an index of their own, or shots of one that is there.

import { judged } from "./accuracy.js";
import * as api from "./api.js";
import * as camera from "./camera.js";
import { $, el, failure, plural } from "./dom.js";
import { chosen } from "./files.js";
import { notice } from "./notice.js";
import { state } from "./state.js";

const FIRST = 48; // photographs that an index is begun with
const SHOWN = 12; // thumbnails a class
const IMAGE = /\.(jpe?g|png|webp|hei[cf])$/i; // what the server accepts

const classes = []; // { name, files, element }
let running = null; // aborts what is being sent

const photographs = () => classes.reduce((sum, one) => sum + one.files.length, 0);
const isNew = () => $("teach-new").checked;

function addClass(name = "", files = []) {
  const one = { name, files: [] };
  const input = el("input", { type: "text", value: name, placeholder: "name of the class", autocomplete: "off", aria: { label: "Name of the class" } });
  input.setAttribute("list", "class-names");
  input.addEventListener("input", () => ((one.name = input.value.trim()), show()));
  const pick = el("input", { type: "file", accept: "image/jpeg,image/png,image/webp,.heic,.heif", multiple: true, hidden: true, aria: { label: "Photographs" } });
  pick.addEventListener("change", () => (give(one, [...pick.files]), (pick.value = "")));
  const choose = el("button", { type: "button" }, "Choose");
  choose.addEventListener("click", () => pick.click());
  const shoot = el("button", { type: "button", hidden: !camera.hasCamera }, "Camera");
  shoot.addEventListener("click", () =>
    camera.open((file) => give(one, [file]), one.name || "this class").catch((error) => notice(error.message)),
  );
  const away = el("button", { type: "button", class: "quiet", aria: { label: "Take this class away" } }, "×");
  away.addEventListener("click", () => {
    takeAway(one);
    if (!classes.length) addClass();
    show();
    $("teach-more").focus();
  });
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

/** Show some of its photographs on a card, as far as there is room. */
function draw(one, files) {
  const room = SHOWN - one.pictures.children.length;
  for (const file of files.slice(0, Math.max(0, room))) {
    const url = URL.createObjectURL(file);
    const image = el("img", { alt: "", src: url });
    const done = () => URL.revokeObjectURL(url);
    image.addEventListener("load", done, { once: true });
    image.addEventListener("error", () => (done(), image.remove()), { once: true });
    one.pictures.append(image);
  }
}

/** The class that loose photographs go to if they are dropped at an element: its card, else the first without any. */
const targetAt = (place) =>
  classes.find(({ element }) => element.contains(place)) ?? classes.find(({ files }) => !files.length);

/** While files are dragged over an element: mark the class that loose ones would go to. Null: no more. */
export function aim(event) {
  const loose = event && [...event.dataTransfer.items].some(({ type }) => type); // a folder has no type
  const target = loose ? targetAt(event.target) : null;
  for (const one of classes) one.element.classList.toggle("target", one === target);
}

/** Files that were dropped at an element, or chosen: each folder is a class, wherever it is dropped. */
export function receive(found, place = null) {
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
  const skipped = other ? ` ${plural(other, "file was", "files were")} skipped: not JPEG, PNG, WebP or HEIC.` : "";
  if (!images.length) return notice(skipped.trim());
  notice(`Added ${plural(images.length, "photograph")} to ${plural(given.length, "class", "classes")}.${skipped}`, () => {
    for (const [one, files] of given) takeBack(one, files, before.has(one));
    while (classes.length < 2) addClass();
    show();
    return "Undone.";
  });
}

/** Take photographs off a class, and the class too, unless it was there before them. */
function takeBack(one, files, stays) {
  if (!classes.includes(one)) return;
  one.files = one.files.filter((file) => !files.has(file));
  if (!stays && !one.files.length) return takeAway(one);
  one.pictures.replaceChildren();
  draw(one, one.files);
}

function show() {
  for (const one of classes) one.count.textContent = one.files.length ? plural(one.files.length, "photograph") : "Drop photographs here";
  const full = classes.filter((one) => one.files.length);
  const unnamed = full.find((one) => !one.name);
  const twice = full.length !== new Set(full.map((one) => one.name)).size;
  const few = isNew() ? 2 : 1;
  const name = $("teach-name").value.trim();
  $("teach-name-label").hidden = !isNew();
  const missing = !state.mayChange
    ? "This server takes no changes: start it without --read-only, or with --token."
    : full.length < few
      ? isNew()
        ? "Two classes with photographs are needed at least; five photographs each are a good beginning."
        : "Drop photographs onto a class."
      : unnamed
        ? "Each class needs a name."
        : twice
          ? "Two classes have one name."
          : isNew() && !name
            ? "The index needs a name."
            : "";
  $("teach-missing").textContent = missing;
  $("teach-go").disabled = Boolean(missing) || running !== null;
  $("teach-go").textContent = `Teach ${plural(photographs(), "photograph")} in ${plural(full.length, "class", "classes")}`;
}

/** What is sent first: of each class in turn, so that every class is there. */
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
  const total = photographs();
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
    report(`Looking at ${plural(total, "photograph")}…`);
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
      report(`Looking at photographs of ${label}…`);
      const before = sent;
      const added = await state.add(label, files, (done) => {
        sent = before + done;
        report(`Looked at ${sent} of ${total} photographs…`);
      });
      if (!added) return;
      skipped.push(...added.skipped);
      sent = before + files.length;
    }
    if (rest.size) {
      report("Learning what is alike…");
      result = await state.fit();
      if (!result) return;
    }
    finished(result, skipped, since, (performance.now() - started) / 1000);
  } catch (error) {
    $("teach-said").textContent = "";
    $("teach-result").hidden = false;
    if (sent) await state.refresh().catch(() => {}); // what was sent is in the index
    const what = error.name === "AbortError" ? "Cancelled." : failure(error);
    const kept = sent ? ` ${plural(sent, "photograph was", "photographs were")} sent before. ` : "";
    $("teach-result").replaceChildren(el("p", {}, what, kept, sent ? undoTo(since) : null));
  } finally {
    running = null;
    $("teach-working").hidden = true;
    show();
  }
}

/** Back to the version before, where there was one. */
function undoTo(since) {
  if (since === null) return null;
  const undo = el("button", { type: "button" }, "Undo");
  undo.addEventListener("click", async () => {
    undo.disabled = true;
    try {
      if (await state.rollback(since, state.info.version)) $("teach-result").replaceChildren("Undone: the index is as it was before.");
    } catch (error) {
      $("teach-result").replaceChildren(failure(error));
    }
  });
  return undo;
}

function finished(result, skipped, since, seconds) {
  const out = skipped.length ? ` ${plural(skipped.length, "file was", "files were")} left out: ${skipped.slice(0, 3).map(({ input }) => input).join(", ")}.` : "";
  const ask = el("button", { type: "button", class: "primary", id: "teach-ask" }, "Ask it about photographs");
  ask.addEventListener("click", () => (location.hash = "#classify"));
  $("teach-result").hidden = false;
  $("teach-result").replaceChildren(
    el("strong", {}, `${result.index} has learnt it in ${seconds.toFixed(1)} s.`),
    el("p", {}, `${judged(result.judged) || "With one photograph a class there is nothing to judge by yet."}${out}`),
    el("p", { class: "buttons" }, ask, undoTo(since)),
  );
  for (const one of classes.splice(0)) one.element.remove();
  addClass();
  addClass();
  $("teach-old").checked = true; // more photographs go to what was made
  follow();
  ask.focus();
}

/** The index that is open may be added to. */
function follow() {
  const can = state.info?.images ?? false;
  $("teach-old").disabled = !can;
  $("teach-old-name").textContent = can ? state.info.name : "the open index";
  if (!can) $("teach-new").checked = true;
  show();
}

$("teach-more").addEventListener("click", () => addClass().input.focus());
$("teach-go").addEventListener("click", go);
$("teach-cancel").addEventListener("click", () => {
  running?.abort(new DOMException("cancelled", "AbortError"));
  $("teach-said").textContent = "Stopping, once the server has what is being sent…";
});
$("teach-folders").addEventListener("click", () => $("teach-folder").click());
$("teach-folder").addEventListener("change", () => (receive(chosen($("teach-folder"))), ($("teach-folder").value = "")));
$("teach-name").addEventListener("input", show);
for (const id of ["teach-new", "teach-old"]) $(id).addEventListener("change", show);
state.addEventListener("index", follow);
state.addEventListener("indexes", follow);
addClass();
addClass();
follow();
