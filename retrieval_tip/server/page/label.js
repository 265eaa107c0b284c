// The Label view, which shows one unlabelled photo after another.

import * as api from "./api.js";
import { classMeant } from "./dialogs.js";
import { $, attempt, button, calm, count, cross, el, failure, isFor, nameOf, named, percent, plural, refill, say, whole } from "./dom.js";
import { NONE, matching, meant } from "./names.js";
import { session } from "./session.js";

const AHEAD = 4; // number of upcoming photos to show
const LAST = 5; // number of answers to show
const CLASSES = 200; // number of classes to show
const LARGE = 1024; // size of the photo, in pixels
const REFUSED = 5; // number of refused labels to show
const SLIDE = 150; // ms
const WORTH = 0.01; // a smaller gain in accuracy is not worth more labels

let current = null; // the photo that is shown, an entry of session.now.queue
let wanted = null; // the number of the photo to show next
const ahead = new Map(); // images that are loaded before they are shown, by photo
const touch = matchMedia("(pointer: coarse)"); // a focused field would open the keyboard

const address = (photo, size) => `${api.labelPhoto(photo)}?size=${size}`;

/** Show the view, and follow the state of the server while it is visible. */
export const showLabelView = () =>
  attempt($("label-problem"), async () => {
    await session.fetch();
    focus();
  });

/** Show a new state, but keep the current photo until it is labelled. */
session.addEventListener("state", () => {
  const { now, rejected } = session;
  const problem = now.problem && { message: (now.unsaved ? `${plural(now.unsaved, "label is", "labels are")} not saved yet: ` : "") + now.problem };
  $("label-problem").replaceChildren(...[problem, rejected].filter(Boolean).map((error) => el("p", {}, failure(error))));
  refused();
  const entryOf = (number) => now.queue.find(({ photo }) => photo === number);
  const first = entryOf(wanted) ?? entryOf(current?.photo);
  if (first) session.putFirst(first.photo === current?.photo && current.guesses.length ? current : first); // guesses do not change afterwards
  if (first?.photo === wanted || !session.waiting) wanted = null;
  progress();
  last();
  if (!session.undoing) show();
});

// --- display ---

function show() {
  const [one] = session.now.queue;
  $("label-stage").hidden = !one;
  $("label-done").hidden = Boolean(one);
  if (one && one !== current) {
    const moved = one.photo !== current?.photo;
    current = one;
    if (moved) picture(one);
    guesses();
    if (moved) $("label-similar-list").replaceChildren();
    similar();
    $("label-why").textContent = one.picked === "random" ? "This photo was drawn at random, to measure the accuracy." : `Why this one: it ${one.why ?? "may help"}.`;
    if (moved) focus();
    if (moved) say(`${nameOf(one.name)}${one.guesses.length ? `, probably ${one.guesses[0].label}` : ""}`);
  }
  if (!one) current = null;
  classes();
  upcoming();
}

const focus = () => $("label-view").hidden || $(touch.matches ? "label-stage" : "label-class").focus({ preventScroll: true });

function picture({ photo, name }) {
  const image = loaded(photo);
  image.alt = nameOf(name);
  $("label-photo").replaceChildren(image, el("figcaption", { class: "file" }, nameOf(name)));
  for (const known of ahead.keys()) if (!session.now.queue.some((one) => one.photo === known)) ahead.delete(known);
}

function loaded(photo) {
  if (!ahead.has(photo)) ahead.set(photo, el("img", { decoding: "sync", src: address(photo, LARGE) }));
  return ahead.get(photo);
}

function guesses() {
  const buttons = current.guesses.map(({ label, probability }, i) => {
    const key = i ? String(i + 1) : "Enter";
    const parts = [el("kbd", {}, key), el("span", { class: "name" }, label), el("span", {}, percent(probability))];
    return el("li", {}, button(parts, () => choose(label), { class: i ? "" : "primary", data: { label }, aria: { keyshortcuts: key } }));
  });
  refill($("label-choices"), buttons);
}

/** Show the classes that match the typed text, and what Enter does with it. Classes keep their order. */
function classes() {
  const text = $("label-class").value.trim();
  const names = Object.keys(session.now.classes);
  const { label, near } = text ? meant(text, names) : {};
  const shown = matching(text, names).slice(0, CLASSES);
  refill($("label-classes"), shown.map((name) => el("li", {}, button(name, () => choose(name), { class: name === label ? "chip primary" : "chip", data: { label: name } }))));
  const known = label === NONE || names.includes(label);
  $("label-meant").textContent = !text ? "" : near ? `Enter: new class “${text}”, or ${near}?` : known ? `Enter: ${label}` : `Enter: new class “${text}”`;
}

/** Show photos in a list, unless it shows them already. `content(image)` returns what the list contains for each. */
function strip(list, photos, content) {
  const shown = [...list.children].map(({ dataset }) => Number(dataset.photo));
  if (String(shown) === String(photos)) return;
  const images = photos.map((photo) => [photo, el("img", { alt: "", src: address(photo, 160) })]);
  list.replaceChildren(...images.map(([photo, image]) => el("li", { data: { photo } }, content(image))));
}

/** Show near-identical photos, which can be labelled together. Marked photos stay marked. */
function similar() {
  const photos = current.similar;
  const press = ({ currentTarget: one }) => {
    one.ariaPressed = String(!isPressed(one));
    $("label-too").checked = similarButtons().every(isPressed);
  };
  $("label-similar").hidden = !photos.length;
  $("label-too-text").textContent = `Also label ${photos.length === 1 ? "this similar photo" : `these ${photos.length} similar photos`}`;
  strip($("label-similar-list"), photos, (image) => button([image], press, { aria: { pressed: "false", label: "Label this photo too" } }));
  $("label-too").checked = photos.length > 0 && similarButtons().every(isPressed);
}

const similarButtons = () => [...$("label-similar-list").querySelectorAll("button")];
const isPressed = ({ ariaPressed }) => ariaPressed === "true";

function upcoming() {
  const next = session.now.queue.slice(1, 1 + AHEAD).map(({ photo }) => photo);
  next.slice(0, 2).forEach(loaded);
  strip($("label-next"), next, (image) => image);
}

/** Show the last answers, latest first. Each can be undone. */
function last() {
  const steps = session.steps.slice(-LAST).reverse();
  const rows = steps.map(({ step, photos, labels }) => {
    const names = new Set(labels.map((label) => label ?? "no label"));
    const said = names.size === 0 ? "skipped" : names.size === 1 ? [...names][0] : plural(names.size, "class", "classes");
    const text = photos.length > 1 ? `${count(photos.length)} × ${said}` : said;
    const image = el("img", { alt: "", loading: "lazy", src: address(photos[0], 160) });
    return el("li", {}, image, el("span", { class: "name", title: text }, text), cross(`Undo ${text}`, () => undo(step)));
  });
  refill($("label-last"), rows);
  $("label-last-part").hidden = !rows.length;
  $("label-undo").disabled = !rows.length;
}

/** Name the labels that could not be saved, so that the user can correct them. */
function refused() {
  const { now } = session;
  const shown = JSON.stringify(now.refused);
  if ($("label-refused").dataset.shown === shown) return;
  $("label-refused").dataset.shown = shown;
  const rows = now.refused.slice(0, REFUSED).map((one) => {
    const dropping = (text, next) => button(text, () => drop(one, next), { class: "quiet" });
    const what = one.label === null ? "The label of this photo could not be removed" : `The label “${one.label}” could not be saved`;
    const buttons = one.label === null ? [] : [dropping("Show this photo", one.photo), " ", dropping("Drop the label", null)];
    return el("p", { title: one.name }, `${nameOf(one.name)}: ${what}: ${one.reason} `, ...buttons);
  });
  const more = now.refused.length - rows.length;
  $("label-refused").replaceChildren(...rows, more > 0 ? el("p", {}, `and ${plural(more, "other label")}`) : "");
}

/** Remove a label that could not be saved, and show the photo `next`, if there is one. */
function drop(one, next) {
  if (next !== null) $("label-class").value = "";
  wanted = next;
  session.now.refused = session.now.refused.filter((other) => other !== one);
  session.label([[one.photo, null]]);
}

function progress() {
  const { now, labelled } = session;
  const { photos, encoded, unsaved, guessed } = now;
  const { estimate, gain = null, more, review } = now.progress ?? {};
  const right = guessed.filter(Boolean).length;
  const rest = photos - labelled;
  const parts = [`${count(labelled)} of ${plural(photos, "photo")} labelled.`];
  if (guessed.length) parts.push(`The guess was right in ${right} of the last ${guessed.length}.`);
  const known = rest > 0 && Boolean(estimate);
  if (known) parts.push(`About ${percent(estimate.accuracy)} of the other ${count(rest)} are right (${whole(estimate.low)}–${whole(estimate.high)} %).`);
  $("label-progress").textContent = parts.join(" ");
  const stop = known && gain !== null && gain < WORTH;
  const ready = known && review && 2 * right >= guessed.length;
  $("label-stop").textContent = !known || gain === null ? "" : stop ? `You can stop here: ${more} more labels would bring less than 1 %.`
    : ready ? `Reviewing now takes less work than ${more} more labels, which would bring about ${whole(gain)} %.`
    : `${more} more labels: about +${whole(gain)} %.`;
  $("label-review").hidden = !now.version || rest <= 0;
  $("label-review").textContent = `Review the other ${count(rest)}, least certain first`;
  $("label-review").classList.toggle("primary", stop || ready);
  $("label-bar").value = photos ? labelled / photos : 0;
  const waiting = [];
  if (encoded < photos) waiting.push(`Reading photos: ${count(encoded)} of ${count(photos)}.`);
  const unfinished = unsaved - now.refused.length + session.unsent;
  if (unfinished > 0) waiting.push(`Saving ${plural(unfinished, "label")}…`);
  else if (labelled && !unsaved) waiting.push(`All labels are saved in “${now.index}”.`);
  $("label-saved").textContent = waiting.join(" ");
}

// --- actions ---

/** Give the photo a label, and also the similar photos that are marked. Return the name of this step. */
function choose(label) {
  label = label.trim();
  if (!current || !label) return null;
  const marked = similarButtons().filter(isPressed).map((one) => Number(one.parentNode.dataset.photo));
  slide(label);
  return done(() => session.label([current.photo, ...marked].map((photo) => [photo, label]), current))[0];
}

const skip = () => current && done(() => session.skip(current));

/** Undo a step, and show its photo again. If it was made before a reload, only the server knows the photo. */
function undo(step = session.steps.at(-1)?.step) {
  if (!step) return;
  current = null;
  done(() => session.undo(step));
}

function done(change) {
  $("label-class").value = "";
  $("label-completed").hidden = true;
  return change();
}

/** Give the photo the class that a typed text means. If this is not clear, ask. */
async function enter(text) {
  if (!current) return;
  const { photo } = current;
  const names = Object.keys(session.now.classes);
  const label = await classMeant(text, names);
  if (!label || photo !== current?.photo) return; // it was dismissed, or somebody else has labelled the photo
  const name = choose(label);
  if (!names.includes(label) || label.length <= text.length || meant(text, names).near) return;
  const onclick = () => {
    const { entry, photos } = session.made(name);
    done(() => session.undo(name));
    session.label(photos.map((one) => [one, text]), entry);
  };
  $("label-completed").replaceChildren(`“${text}” was completed to ${label}.`, " ", button(`New class “${text}”`, onclick));
  $("label-completed").hidden = false;
}

/** Show the photo moving to the button of its class, unless the user prefers reduced motion. */
function slide(label) {
  const image = $("label-photo").querySelector("img");
  const target = [...$("label-stage").querySelectorAll("button")].find(({ dataset }) => dataset.label === label) ?? $("label-class");
  if (!image || calm.matches) return;
  const [from, to] = [image, target].map((one) => one.getBoundingClientRect());
  const copy = el("img", { alt: "", src: image.src, class: "sliding" });
  for (const side of ["left", "top", "width", "height"]) copy.style[side] = `${from[side]}px`;
  document.body.append(copy);
  const end = `translate(${to.left - from.left}px, ${to.top - from.top}px) scale(${to.height / from.height})`;
  copy.animate({ transform: ["none", end], opacity: [1, 0.5] }, SLIDE).finished.then(() => copy.remove());
}

named($("label-form"), enter);
$("label-class").addEventListener("input", classes);
$("label-photo").addEventListener("click", focus);
$("label-skip").addEventListener("click", skip);
$("label-none").addEventListener("click", () => choose(NONE));
$("label-undo").addEventListener("click", () => undo());
$("label-too").addEventListener("change", () => {
  for (const one of similarButtons()) one.ariaPressed = String($("label-too").checked);
});

/** While nothing is typed, these keys act. All letters, and all other keys, go to the field. */
const guess = (i) => () => current?.guesses[i] && choose(current.guesses[i].label);
const KEYS = { 1: guess(0), 2: guess(1), 3: guess(2), 0: () => choose(NONE), "+": () => $("label-too").click(), ArrowRight: skip, ArrowLeft: () => undo() };
addEventListener("keydown", (event) => {
  const { key, target } = event;
  const field = $("label-class");
  if (!isFor("label-view", event) || event.isComposing) return;
  if (target !== field && target.closest("nav a, summary, select, textarea, dialog, input:not([type=checkbox])")) return;
  const typed = field.value !== "";
  if (typed && key === "Escape") (field.value = ""), classes();
  else if (typed && key === "Enter" && event.shiftKey) choose(field.value); // a new class of exactly this name
  else if (!typed && key in KEYS) event.repeat || KEYS[key]();
  else if (!typed && key === "Enter" && !target.closest("button, a")) event.repeat || guess(0)();
  else {
    if (target !== field && key.length === 1 && key !== " ") field.focus(); // it gets this letter
    return;
  }
  event.preventDefault();
});
