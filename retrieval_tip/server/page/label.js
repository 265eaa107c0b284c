// The Label view, which shows one unlabelled photo after another.

import * as api from "./api.js";
import { classMeant, reported } from "./dialogs.js";
import { $, attempt, button, calm, count, cross, cut, el, failure, isFor, nameOf, named, percent, plural, refill, say } from "./dom.js";
import { NONE, matching, meant } from "./names.js";
import { session } from "./session.js";
import { state } from "./state.js";

const AHEAD = 4; // number of upcoming photos to show
const LAST = 5; // number of answers to show
const ALIKE = 12; // number of photos to show that can be labelled together
const CLASSES = 200; // number of classes to show
const LARGE = 1024; // size of the photo, in pixels
const SLIDE = 150; // ms
const WORTH = 0.01; // a smaller gain in accuracy is not worth more labels

let current = null; // the photo that is shown, an entry of session.now.queue
let wanted = null; // the number of the photo to show next
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
  encoder();
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
    if (moved) $("label-too").checked = false;
    similar();
    $("label-why").textContent = one.picked === "random" ? "This photo was drawn at random, to estimate the accuracy on the other photos." : `Why this one: it ${one.why ?? "may help"}.`;
    if (moved) focus();
    if (moved) say(`${nameOf(one.name)}${one.guesses.length ? `, probably ${one.guesses[0].label}` : ""}`);
  }
  if (!one) current = null;
  classes();
  upcoming();
}

const focus = () => $("label-view").hidden || $(touch.matches ? "label-stage" : "label-class").focus({ preventScroll: true });

function picture({ photo, name }) {
  const image = el("img", { decoding: "sync", alt: nameOf(name), src: address(photo, LARGE) });
  $("label-photo").replaceChildren(image, el("figcaption", { class: "file" }, nameOf(name)));
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

/** Show photos in a list, unless it shows them already. */
function strip(list, photos, size) {
  const shown = [...list.children].map(({ dataset }) => Number(dataset.photo));
  if (String(shown) === String(photos)) return;
  list.replaceChildren(...photos.map((photo) => el("li", { data: { photo } }, el("img", { alt: "", src: address(photo, size) }))));
}

/** Show the other photos of the visit, or near-identical photos, which can be labelled together. */
function similar() {
  const { similar: photos, visit } = current;
  const [one, many] = visit ? ["the other photo of this visit", "other photos of this visit"] : ["this similar photo", "similar photos"];
  $("label-similar").hidden = !photos.length;
  $("label-too-text").textContent = `Also label ${photos.length === 1 ? one : `${visit ? "the" : "these"} ${count(photos.length)} ${many}`}`;
  strip($("label-similar-list"), photos.slice(0, ALIKE), 160);
}

/** Show the next photos. They are loaded in the size in which they are shown afterwards. */
const upcoming = () => strip($("label-next"), session.now.queue.slice(1, 1 + AHEAD).map(({ photo }) => photo), LARGE);

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
  const rows = now.refused.map((one) => {
    const removing = one.label === null;
    const what = removing ? "The label of this photo could not be removed" : `The label “${one.label}” could not be saved`;
    const again = removing ? null : button("Drop it and show the photo", () => drop(one), { class: "quiet" });
    return el("p", { title: one.name }, `${nameOf(one.name)}: ${what}: ${one.reason} `, again);
  });
  $("label-refused").replaceChildren(...rows);
}

/** Remove a label that could not be saved, and show its photo again, if it can be shown. */
function drop(one) {
  $("label-class").value = "";
  wanted = one.photo;
  session.now.refused = session.now.refused.filter((other) => other !== one);
  session.label([[one.photo, null]]);
}

/** Offer to join another encoder, until it is declined or has been joined. */
function encoder() {
  const { encoder: one } = session.now;
  $("label-encoder").hidden = !one;
  if (!one) return;
  const { name, tried, before, after, encoded, problem } = one;
  const better = `With the encoder ${cut(name, 40)}, which is on this computer, ${after} instead of ${before} of ${tried} labelled photos are right.`;
  $("label-encoder").title = `${name}: each of these photos is classified by the others`;
  $("label-encoder").firstChild.textContent = encoded ? `The encoder ${cut(name, 40)} is being joined.` : problem ?? better;
  $("label-join").hidden = encoded !== null;
  $("label-alone").textContent = encoded ? "Cancel" : "Not now";
}

function progress() {
  const { now, labelled } = session;
  const { photos, encoded, unsaved, guessed, others } = now;
  const { gain = null, more, review } = now.progress ?? {};
  const right = guessed.filter(Boolean).length;
  const rest = photos - labelled;
  const parts = [`${count(labelled)} of ${plural(photos, "photo")} labelled.`];
  if (guessed.length) parts.push(`The guess was right in ${right} of the last ${guessed.length}.`);
  const known = rest > 0 && Boolean(others);
  if (known) parts.push(`${others}.`);
  $("label-progress").textContent = parts.join(" ");
  const stop = known && gain !== null && gain < WORTH;
  const ready = known && review && 2 * right >= guessed.length;
  const fewer = `about ${count(Math.max(1, Math.round(gain * rest)))} fewer wrong`;
  $("label-stop").textContent = !known || gain === null ? "" : stop ? `You can stop here: ${more} more labels would improve less than 1 % of the answers.`
    : ready ? `Reviewing now takes less work than ${more} more labels, which would make ${fewer}.`
    : `${more} more labels: ${fewer}.`;
  $("label-review").hidden = !now.version || rest <= 0;
  $("label-review").replaceChildren(`Review the other ${count(rest)}, least certain first `, el("kbd", {}, "Shift Enter"));
  $("label-review").classList.toggle("primary", stop || ready);
  $("label-bar").value = photos ? labelled / photos : 0;
  const waiting = [];
  if (encoded < photos) waiting.push(`Reading photos: ${count(encoded)} of ${count(photos)}.`);
  if (now.encoder?.encoded) waiting.push(`Reading photos with it: ${now.encoder.encoded.map(count).join(" of ")}.`);
  if (unsaved > now.refused.length || session.waiting) waiting.push("Saving labels…");
  else if (labelled && !unsaved) waiting.push(`All labels are saved in “${now.index}”.`);
  $("label-saved").textContent = waiting.join(" ");
}

// --- actions ---

/** Give the photo a label, and also the similar photos if they are marked. */
function choose(label) {
  label = label.trim();
  if (!current || !label) return;
  const marked = $("label-too").checked ? current.similar : [];
  slide(label);
  done(() => session.label([current.photo, ...marked].map((photo) => [photo, label]), current));
}

const skip = () => current && done(() => session.skip(current));

/** Undo a step, and show its photo again. If it was made before a reload, only the server knows the photo. */
function undo(step = session.steps.at(-1)?.step) {
  if (!step) return;
  current = null;
  done(() => session.undo(step));
}

const join = (is) => reported(async () => (await state.joinEncoder(is)) && session.fetch());

function done(change) {
  $("label-class").value = "";
  change();
}

/** Give the photo the class that a typed text means. If this is not clear, ask. */
async function enter(text) {
  if (!current) return;
  const { photo } = current;
  const label = await classMeant(text, Object.keys(session.now.classes));
  if (!label || photo !== current?.photo) return; // it was dismissed, or somebody else has labelled the photo
  choose(label);
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
$("label-join").addEventListener("click", () => join(true));
$("label-alone").addEventListener("click", () => join(false));

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
  else if (key === "Enter" && event.shiftKey) $("label-review").hidden || $("label-review").click();
  else if (!typed && key in KEYS) event.repeat || KEYS[key]();
  else if (!typed && key === "Enter" && !target.closest("button, a")) event.repeat || guess(0)();
  else {
    if (target !== field && key.length === 1 && key !== " ") field.focus(); // it gets this letter
    return;
  }
  event.preventDefault();
});
