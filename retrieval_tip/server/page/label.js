// The Label view, which shows one unlabelled photo after another. Labels are sent in the background, so that the next
// photo appears at once. The server chooses the photos and saves the labels.

import * as api from "./api.js";
import { ask } from "./dialogs.js";
import { $, attempt, button, calm, count, el, failure, isFor, named, nameOf, percent, plural, refill, say, whole } from "./dom.js";
import { meant } from "./names.js";
import { notice } from "./notice.js";
import { state } from "./state.js";

const NONE = "none of these"; // the class of photos that belong to no other class
const CHOICES = 9; // one for each digit key
const AHEAD = 4; // number of upcoming photos to show
const LARGE = 1024; // size of the photo, in pixels
const REFUSED = 5; // number of refused labels to show
const SLIDE = 150; // ms
const AGAIN = 1000; // ms between two requests for the state, or between two attempts to send labels

let session = null; // GET /v1/label
let current = null; // the photo that is shown, an entry of session.queue
let polling = null;
let opening = false; // whether the new index is being opened
let wanted = null; // the number of the photo to show next
let rejected = null; // why the server did not accept the last change
const steps = new Map(); // the queue entry, the photos and the label of each step on this page, by its name
const outbox = []; // changes that are not sent yet: a step, or the name of a step to undo
let answered = 0; // number of changes that the server has answered
const ahead = new Map(); // images that are loaded before they are shown, by photo

const address = (photo, size) => `${api.labelPhoto(photo)}?size=${size}`;

/** Show the view, and follow the state of the server while it is visible. */
export const showLabelView = () =>
  attempt($("label-problem"), async () => {
    await fetchState();
    focus();
  });

/** Fetch the state of the session. It is outdated if the server has answered a change in the meantime. */
async function fetchState() {
  const before = answered;
  const answer = await api.labelling();
  if (before === answered) take(answer);
  else pollLater();
}

function pollLater() {
  clearTimeout(polling);
  polling = setTimeout(poll, AGAIN);
}

/** Show a new state with the changes that are not sent yet, but keep the current photo until it is labelled. */
function take(answer) {
  session = answer;
  outbox.forEach(apply);
  const problem = answer.problem && { message: (answer.unsaved ? `${plural(answer.unsaved, "label is", "labels are")} not saved yet: ` : "") + answer.problem };
  $("label-problem").replaceChildren(...[problem, rejected].filter(Boolean).map((error) => el("p", {}, failure(error))));
  refused();
  if (session.version && !state.info && !opening) {
    opening = true;
    state.reopen(session.index);
  }
  const known = state.info?.name === session.index ? state.info.version : session.version;
  if (known < session.version) state.refresh().catch(() => {}); // the next answer tries again
  const entryOf = (number) => session.queue.find(({ photo }) => photo === number);
  const first = entryOf(wanted) ?? entryOf(current?.photo);
  if (first) putFirst(first.photo === current?.photo && current.guesses.length ? current : first); // guesses do not change afterwards
  if (first?.photo === wanted || !outbox.length) wanted = null;
  if (outbox.some(({ undo }) => undo && !steps.has(undo))) progress(); // the server knows which photo to show
  else show();
  clearTimeout(polling);
  if (!$("label-view").hidden && (answer.busy || answer.encoded < answer.photos)) pollLater();
}

function putFirst(entry) {
  session.queue = [entry, ...session.queue.filter(({ photo }) => photo !== entry.photo)];
}

async function poll() {
  try {
    await fetchState();
  } catch (error) {
    if (api.passing(error)) pollLater();
  }
}

// --- display ---

function show() {
  progress();
  const [one] = session.queue;
  $("label-stage").hidden = !one;
  $("label-done").hidden = Boolean(one);
  if (one && one !== current) {
    const moved = one.photo !== current?.photo;
    current = one;
    if (moved) picture(one);
    const before = $("label-choices").children.length;
    choices();
    if (moved) $("label-similar-list").replaceChildren();
    similar();
    $("label-why").textContent = one.picked === "random" ? "This photo was drawn at random, to measure the accuracy." : `Why this one: it ${one.why ?? "may help"}.`;
    if (moved || (before && !$("label-choices").children.length)) focus();
    if (moved) say(`${nameOf(one.name)}${one.guesses.length ? `, probably ${one.guesses[0].label}` : ""}`);
  }
  if (!one) current = null;
  upcoming();
}

/** Focus the field if there is a text, or no class to choose, so that no letter of a name is taken for a shortcut. */
function focus() {
  const typing = $("label-class").value || !$("label-choices").children.length;
  $(typing ? "label-class" : "label-stage").focus({ preventScroll: true });
}

function picture({ photo, name }) {
  const image = loaded(photo);
  image.alt = nameOf(name);
  $("label-photo").replaceChildren(image, el("figcaption", { class: "file" }, nameOf(name)));
  for (const known of ahead.keys()) if (!session.queue.some((one) => one.photo === known)) ahead.delete(known);
}

function loaded(photo) {
  if (!ahead.has(photo)) ahead.set(photo, el("img", { decoding: "sync", src: address(photo, LARGE) }));
  return ahead.get(photo);
}

function choices() {
  const guessed = current.guesses.map(({ label, probability }) => [label, probability]);
  const known = new Set(guessed.map(([label]) => label));
  const others = session.classes.filter(({ label }) => !known.has(label)).sort((a, b) => b.photos - a.photos);
  const all = [...guessed, ...others.map(({ label }) => [label, null])].slice(0, CHOICES);
  const buttons = all.map(([label, probability], i) => {
    const guess = i === 0 && probability !== null;
    const share = probability === null ? "" : percent(probability);
    const keys = { keyshortcuts: guess ? "1 Enter" : String(i + 1) };
    const parts = [el("kbd", {}, String(i + 1)), el("span", { class: "name" }, label), el("span", {}, share), guess ? el("kbd", {}, "Enter") : null];
    return el("li", {}, button(parts, () => choose(label), { class: guess ? "primary" : "", data: { label }, aria: keys }));
  });
  refill($("label-choices"), buttons);
  $("class-names").replaceChildren(...session.classes.map(({ label }) => el("option", { value: label })));
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
  const next = session.queue.slice(1, 1 + AHEAD).map(({ photo }) => photo);
  next.slice(0, 2).forEach(loaded);
  strip($("label-next"), next, (image) => image);
}

/** Name the labels that could not be saved, so that the user can correct them. */
function refused() {
  const shown = JSON.stringify(session.refused);
  if ($("label-refused").dataset.shown === shown) return;
  $("label-refused").dataset.shown = shown;
  const rows = session.refused.slice(0, REFUSED).map((one) => {
    const dropping = (text, next) => button(text, () => drop(one, next), { class: "quiet" });
    const what = one.label === null ? "The label of this photo could not be removed" : `The label “${one.label}” could not be saved`;
    const buttons = one.label === null ? [] : [dropping("Show this photo", one.photo), " ", dropping("Drop the label", null)];
    return el("p", { title: one.name }, `${nameOf(one.name)}: ${what}: ${one.reason} `, ...buttons);
  });
  const more = session.refused.length - rows.length;
  $("label-refused").replaceChildren(...rows, more > 0 ? el("p", {}, `and ${plural(more, "other label")}`) : "");
}

/** Remove a label that could not be saved, and show the photo `next`, if there is one. */
function drop(one, next) {
  if (next !== null) $("label-class").value = "";
  wanted = next;
  session.refused = session.refused.filter((other) => other !== one);
  step(null, [one.photo], null);
  refused();
}

function undoable() {
  const names = [...session.steps];
  for (const { step, undo } of outbox) {
    if (step && !names.includes(step)) names.push(step);
    else if (names.includes(undo)) names.splice(names.indexOf(undo), 1);
  }
  return names;
}

function added({ labels = [], undo }) {
  const undone = steps.get(undo);
  return labels.filter(({ label }) => label !== null).length - (undone?.label ? undone.photos.length : 0);
}

function progress() {
  const { photos, encoded, unsaved, progress: estimate } = session;
  const unsent = outbox.reduce((sum, { labels = [] }) => sum + labels.length, 0);
  const number = session.labelled + outbox.reduce((sum, change) => sum + added(change), 0);
  const rest = photos - number;
  const parts = [`${count(number)} of ${plural(photos, "photo")} labelled.`];
  if (rest && estimate?.accuracy != null) {
    const { accuracy, low, high, gain, more } = estimate;
    parts.push(`About ${percent(accuracy)} of the rest are classified correctly (${whole(low)} to ${whole(high)} %).`);
    if (gain !== null) parts.push(`${more} more labels: about +${whole(gain)} %.`);
  } else if (rest && estimate && estimate.drawn < estimate.needed) {
    parts.push(`It is too early to estimate the accuracy: ${estimate.drawn} of ${estimate.needed} random photos are labelled.`);
  }
  $("label-progress").textContent = parts.join(" ");
  $("label-bar").value = photos ? number / photos : 0;
  const waiting = [];
  if (encoded < photos) waiting.push(`Reading photos: ${count(encoded)} of ${count(photos)}.`);
  const unfinished = unsaved - session.refused.length + unsent;
  if (unfinished > 0) waiting.push(`Saving ${plural(unfinished, "label")}…`);
  else if (number && !unsaved) waiting.push(`All labels are saved in “${session.index}”.`);
  $("label-saved").textContent = waiting.join(" ");
  $("label-undo").disabled = !undoable().length;
  $("label-sort").hidden = !session.version;
  $("label-sort-into").value ||= `${session.index}-sorted`;
}

// --- actions ---

/** Give the photo a label, and also the similar photos that are marked. Return the name of this step. */
function choose(label) {
  label = label.trim();
  if (!current || !label) return null;
  const marked = similarButtons().filter(isPressed).map((one) => Number(one.parentNode.dataset.photo));
  slide(label);
  $("label-class").value = "";
  return step(current, [current.photo, ...marked], label);
}

/** Ask whether a text is a new class or means a class that it resembles. If this is dismissed, return undefined. */
async function either(text, near) {
  const onkeydown = (event) => {
    if (event.key !== "Enter" || !(event.shiftKey || event.repeat)) return;
    event.preventDefault();
    if (!event.repeat) event.target.closest("dialog").close("new");
  };
  const choice = (value, name, keys, properties) => {
    const content = [el("span", {}, name), " ", el("kbd", {}, keys)];
    return el("button", { value, onkeydown, aria: { keyshortcuts: keys }, ...properties }, ...content);
  };
  const other = choice("new", `New class “${text}”`, "Shift+Enter", {});
  const known = choice("near", near, "Enter", { class: "primary", autofocus: true });
  return { new: text, near }[await ask("alike", `New class “${text}”, or ${near}?`, [], [other, known])];
}

/** Give the photo the class that a typed text means. If this is not clear, ask. */
async function enter(text) {
  if (!current) return;
  const { photo } = current;
  const classes = session.classes.map(({ label }) => label);
  let { label, near } = text.toLowerCase() === NONE ? { label: NONE } : meant(text, classes);
  if (near) label = await either(text, near);
  if (!label || photo !== current?.photo) return; // it was dismissed, or somebody else has labelled the photo
  const name = choose(label);
  if (near || !classes.includes(label) || label.length <= text.length) return;
  const onclick = () => {
    const { entry, photos } = steps.get(name);
    put({ undo: name });
    step(entry, photos, text);
  };
  $("label-completed").replaceChildren(`“${text}” was completed to ${label}.`, " ", button(`New class “${text}”`, onclick));
  $("label-completed").hidden = false;
}

/** Show the photo moving to the button of its class, unless the user prefers reduced motion. */
function slide(label) {
  const image = $("label-photo").querySelector("img");
  const target = [...$("label-choices").querySelectorAll("button")].find(({ dataset }) => dataset.label === label) ?? $("label-class");
  if (!image || calm.matches) return;
  const [from, to] = [image, target].map((one) => one.getBoundingClientRect());
  const copy = el("img", { alt: "", src: image.src, class: "sliding" });
  for (const side of ["left", "top", "width", "height"]) copy.style[side] = `${from[side]}px`;
  document.body.append(copy);
  const end = `translate(${to.left - from.left}px, ${to.top - from.top}px) scale(${to.height / from.height})`;
  copy.animate({ transform: ["none", end], opacity: [1, 0.5] }, SLIDE).finished.then(() => copy.remove());
}

function skip() {
  if (!current) return;
  $("label-class").value = "";
  step(current, [current.photo]);
}

const unique = () => [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(36)).join("-");

/** Give photos a label, remove their label if it is null, or skip them. Show the next photo, and send the change.
 *
 *  Return the name of this step. `entry` is the queue entry that returns if the step is undone. */
function step(entry, photos, label) {
  const name = unique();
  steps.set(name, { entry, photos, label });
  put(label === undefined ? { step: name, skip: photos } : { step: name, labels: photos.map((photo) => ({ photo, label })) });
  show();
  return name;
}

/** Undo the last step, and show its photo again. If the step was made before a reload, only the server knows the photo. */
function undo() {
  const name = undoable().at(-1);
  if (!name) return;
  current = null;
  put({ undo: name });
  if (steps.has(name)) show();
  else progress();
}

let sending = false;

function put(change) {
  rejected = null;
  $("label-completed").hidden = true;
  outbox.push(change);
  apply(change);
  send();
}

/** Make a change in the queue and in the list of classes. */
function apply({ step, undo }) {
  const { entry, photos, label } = steps.get(step ?? undo) ?? {};
  if (undo && entry) putFirst(entry);
  if (undo) return;
  session.queue = session.queue.filter(({ photo }) => !photos.includes(photo));
  for (const one of session.queue) one.similar = one.similar.filter((photo) => !photos.includes(photo));
  if (label && label !== NONE && !session.classes.some((one) => one.label === label)) session.classes.push({ label, photos: 0 });
}

/** Send all changes in order. While the server cannot be reached or cannot store them, try again. */
async function send() {
  if (sending) return;
  sending = true;
  while (outbox.length) {
    let answer;
    try {
      answer = await state.setLabels(outbox[0]);
      if (answer === null) break; // no token
      notice("");
    } catch (error) {
      if (api.passing(error) || error.status >= 500) {
        notice(`${error.message} ${plural(outbox.length, "change is", "changes are")} waiting. Trying again…`);
        await api.pause(AGAIN);
        continue;
      }
      rejected = error;
    }
    outbox.shift();
    answered++;
    if (answer) take(answer);
    else await poll();
  }
  sending = false;
}

$("label-sort-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("label-sorted").textContent = "Copying…";
  const wrong = $("label-sort-wrong").value;
  const sorting = state.sortPhotos($("label-sort-into").value.trim(), wrong ? Number(wrong) / 100 : null);
  const said = (sorted) => (sorted ? `${sorted.summary}. To undo this, run: ${sorted.undo}` : "");
  $("label-sorted").textContent = await sorting.then(said, ({ message }) => message);
});
addEventListener("beforeunload", (event) => outbox.length && event.preventDefault());

named($("label-form"), enter);
$("label-class").addEventListener("keydown", (event) => {
  if (event.key === "Escape") $("label-stage").focus();
  if (event.key !== "Enter" || !event.shiftKey) return;
  event.preventDefault();
  choose($("label-class").value); // a new class of exactly this name
});
$("label-photo").addEventListener("click", focus);
$("label-skip").addEventListener("click", skip);
$("label-none").addEventListener("click", () => choose(NONE));
$("label-undo").addEventListener("click", undo);
$("label-too").addEventListener("change", () => {
  for (const one of similarButtons()) one.ariaPressed = String($("label-too").checked);
});
addEventListener("keydown", (event) => {
  if (!isFor("label-view", event) || event.target.matches("input:not([type=checkbox]), select, textarea")) return;
  const key = event.key.toLowerCase();
  const type = () => $("label-class").focus();
  const actions = { s: skip, n: () => choose(NONE), z: undo, a: () => $("label-too").click(), t: type, "/": type };
  if (/^[1-9]$/.test(key)) {
    const choice = $("label-choices").querySelectorAll("button")[Number(key) - 1];
    if (!choice) return;
    choose(choice.dataset.label);
  } else if (key === "enter" && !event.target.closest("button, a, summary") && current?.guesses.length) choose(current.guesses[0].label);
  else if (key in actions) actions[key]();
  else return;
  event.preventDefault();
});
