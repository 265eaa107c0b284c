// The photos on the page, with the requests that classify them, their grid, and actions on one or several photos.

import * as api from "./api.js";
import { classForm, notice, reported, undoable } from "./dialogs.js";
import * as drawer from "./drawer.js";
import { $, button, chips, count, cross, debounced, el, framed, isBare, percent, picks, plural, say } from "./dom.js";
import { Grid } from "./grid.js";
import { matching } from "./names.js";
import { FolderPhoto, Photo, parameters } from "./photo.js";
import { session } from "./session.js";
import { state } from "./state.js";
import { showUnknown } from "./unknown.js";

const BLOCK = 64; // features per request
const DOUBTFUL = 0.95; // below this probability, a tile has a bar
const OTHERS = 2; // number of other classes on a tile
const TOGETHER = 42; // number of photos, about two screens, of which those with the same answer are shown together
const CLASSES = 200; // number of classes to choose from for the selected photos; any other can be typed

export const photos = [];
const refused = new Map(); // names of skipped files by reason
let leaving = new AbortController(); // aborts requests to an index that is no longer open
let moving = new AbortController(); // aborts requests for another version

const grid = new Grid($("grid"), {
  image: (photo) => photo.image(240, ""),
  tile,
  opened(photo, target) {
    const label = target?.dataset.label ?? painted;
    if (label && state.info.changes) return teach(grid.selected.has(photo) ? acting() : [photo], label);
    open(photo);
    $("drawer").focus({ preventScroll: true });
  },
  together: (photo) => (photo.visit === null ? [photo] : grid.items.filter((one) => one.visit === photo.visit && !one.taught === !photo.taught)),
  kind: (photo) => classOf(photo),
  chosen: showChosen,
  accepted: (all) => (all && folder().length ? $("screen-right").click() : acceptAll(acting())),
  pressed(event) {
    const { key } = event;
    if (key === "Delete") putAway(acting());
    else if (key === "Escape" && painted) paint();
    else if (key === "Escape" && drawer.openPhoto()) drawer.leave();
    else if (key === "+" && offered().length) newButton.click();
    else if (key === "*" && given) paint();
    else if (/^[123]$/.test(key) && isBare(event)) teachChoice(Number(key) - 1);
    else if (key.length === 1 && isBare(event) && acting().length && state.info.changes) {
      if (!grid.selected.size) grid.select(acting());
      field.focus(); // it gets this letter
      return false;
    } else return false;
    return true;
  },
});

// --- requests ---

async function ask(photo) {
  photo.busy = true;
  photo.problem = null;
  showSoon();
  const signal = AbortSignal.any([photo.gone.signal, leaving.signal]);
  await classify([photo], api.form([["images", photo.file]]), { features: true }, signal);
}

/** Classify photos, and show their answers. Photos whose answers do not hold are classified again. */
async function classify(some, sent, asked, signal) {
  try {
    const answer = await api.classify(sent, { ...parameters(), ...asked }, { signal });
    if (!answer.results.length) throw new api.Problem(answer.skipped[0].reason, 422);
    if (answer.version !== state.info.version) await state.refresh();
    signal.throwIfAborted(); // a newer request has been sent, and its answer may have arrived
    const again = some.filter((photo, i) => !photo.take(answer, answer.results[i], asked.without ?? []));
    askAgain(again.filter(({ gone }) => !gone.signal.aborted));
  } catch (error) {
    if (error.name === "AbortError") return;
    for (const photo of some) fail(photo, error);
  }
  showSoon();
}

function fail(photo, error) {
  photo.busy = false;
  photo.problem = error;
  if (api.passing(error) || photo.feature) return;
  refuse(photo, error);
  remove([photo]); // because it will never get an answer
}

function refuse({ name }, { message }) {
  const reason = message.startsWith(`${name}: `) ? message.slice(name.length + 2) : message; // files with the same one share a line
  refused.set(reason, [...(refused.get(reason) ?? []), name]);
}

// --- the photos of the labelling session ---

const folder = () => photos.filter(({ inFolder }) => inFolder);
let told = ""; // the state of the session whose answers are shown, or are being fetched
let changed = null; // photos that got another label while they are fetched, which takes longer than a label
let alike = []; // groups of photos of the session without a match that are shown
let newAlike = []; // the newest groups, which are shown with the next screen
let held = []; // photos whose newest answer is shown with the next screen, because a person looks at an earlier one

/** Whether the answers on the screen are out of date, because the person has just come to it. Nobody can confirm them. */
const isOld = () => $("grid").ariaBusy === "true";
const setOld = (is) => ($("grid").ariaBusy = String(is));
const begins = () => isOld() || !grid.onScreen().length;

/** Show the labels and answers of all photos of the session. */
async function showFolder() {
  const { now } = session;
  if (!now?.version || $("classify-view").hidden || now.index !== state.info?.name || session.waiting) return;
  const read = now.encoded < now.photos ? Math.floor(Math.log2(now.encoded)) : now.photos; // not for each of thousands
  const at = [now.version, read, session.labelled].join();
  if (at === told || changed) return;
  told = at;
  const newer = (changed = new Set());
  const answer = await reported(() => api.request("/v1/label/answers", { patience: Infinity }));
  changed = null;
  if (told !== at) return showFolder();
  if (!answer) return (told = "");
  if (answer.version < now.version || answer.read < now.encoded) told = ""; // others were being computed already
  const known = new Map(folder().map((photo) => [photo.number, photo]));
  const fresh = answer.photos.filter(({ photo }) => !known.has(photo)).map((one) => new FolderPhoto(one));
  for (const one of fresh) photos.push(one), known.set(one.number, one);
  for (const one of answer.photos) newer.has(known.get(one.photo)) || known.get(one.photo).tell(one);
  for (const [visit, some] of Map.groupBy(folder(), (one) => one.visit)) for (const one of some) one.together = visit === null ? 1 : some.length;
  newAlike = answer.groups.map((numbers) => numbers.map((number) => known.get(number)));
  held = [...known.values()];
  if (fresh.length === answer.photos.length) $("filter-state").value = "rest";
  if (begins()) turn();
  else release(fresh.length ? arrange : showSoon);
  if (document.activeElement === document.body) $("grid").focus({ preventScroll: true });
  return showFolder(); // there may be more labels by now
}
session.addEventListener("state", () => (showFolder(), $("classify-view").hidden || showSoon()));
addEventListener("hashchange", () => ((told = ""), setOld(folder().length > 0), painted && paint()));

/** Show the newest answers of photos that nobody looks at. New photos come last. */
function release(show = showSoon) {
  const looked = new Set([...grid.onScreen(), ...alike.flat(), drawer.openPhoto()]);
  for (const photo of held) if (!looked.has(photo)) photo.renew();
  held = held.filter((photo) => looked.has(photo));
  show();
}
addEventListener("scroll", framed(() => held.length && release()), { passive: true, capture: true });

/** Begin the next screen, with the newest answers in a new order. */
function turn() {
  for (const photo of held) photo.renew();
  held = [];
  alike = newAlike;
  setOld(false);
  resort();
}

let given = null; // the class of the last correction
let painted = null; // the class that each click gives, if any

/** Return the photos on the screen that corrections have taught, but whose tiles still show another answer. */
const offered = () => held.filter(({ taught, winner, newest: { guesses: [best], no_match } }) =>
  taught === null && best && !no_match && best.label !== winner?.label);
const newButton = button("", () => (offered().forEach((photo) => photo.renew()), showSoon()), { aria: { keyshortcuts: "+" } });
const paintButton = button("", () => paint(), { aria: { keyshortcuts: "*" } });

/** Begin or stop to give a class to each photo that is clicked. */
function paint() {
  painted = painted ? null : given;
  showTaught();
  notice(painted ? `Each click on a photo gives ${painted}.` : "", undefined, paintButton);
}

/** Show what the last correction offers: the new answers of other photos, and painting. */
function showTaught() {
  const { length } = offered();
  newButton.hidden = !length;
  newButton.replaceChildren(`Show ${plural(length, "new answer")} `, el("kbd", {}, "+"));
  paintButton.replaceChildren(painted ? "Stop painting " : "Paint ", el("kbd", {}, "*"));
  paintButton.title = `Each click on a photo gives ${given}`;
  $("grid").classList.toggle("painting", painted !== null);
}

/** Give photos of the session labels, as [photo, label] pairs, show what follows, and offer to undo this. */
function relabel(pairs, follow = arrange) {
  const which = pairs.map(([photo]) => photo);
  const before = which.map(({ taught }) => taught);
  const steps = session.label(pairs.map(([photo, label]) => [photo.number, label]));
  for (const [photo, label] of pairs) (photo.taught = label), changed?.add(photo);
  const goOn = next(which);
  grid.select([]);
  follow();
  if (!drawer.openPhoto()) goOn(document.activeElement === $("grid")); // pressing a button does not scroll
  const names = new Set(pairs.map(([, label]) => label));
  given = names.size === 1 ? [...names][0] : null;
  const undo = async () => {
    steps.toReversed().forEach((step) => session.undo(step));
    which.forEach((photo, i) => ((photo.taught = before[i]), changed?.add(photo)));
    given = null;
    arrange();
    return "Undone.";
  };
  const more = given ? [newButton, paintButton] : [newButton];
  notice(`Labelled ${plural(pairs.length, "photo")} as ${given ?? plural(names.size, "class", "classes")}.`, undo, ...more);
  showTaught();
}

/** Classify photos again, by their features if they have any. An example is classified without itself. */
async function askAgain(some) {
  some.filter(({ feature }) => !feature).forEach(ask);
  const asked = some.filter(({ feature }) => feature);
  const first = new Set(grid.items.slice(0, 60));
  const ordered = asked.toSorted((a, b) => first.has(b) - first.has(a)); // these are probably visible
  for (const photo of asked) photo.busy ||= !photo.current;
  const blocks = [];
  for (const like of Map.groupBy(ordered, ({ current, without }) => current && without.join()).values())
    for (let i = 0; i < like.length; i += BLOCK) blocks.push(like.slice(i, i + BLOCK));
  await Promise.all(blocks.map(askBlock));
}

/** Classify photos again that leave out the same examples. */
function askBlock(block) {
  const [{ current, without }] = block;
  const signal = AbortSignal.any([moving.signal, leaving.signal]);
  const asked = { without: current ? without : [], features: !current };
  return classify(block, api.floats(block.map(({ feature }) => feature)), asked, signal);
}

/** Keep files as photos of the session. */
async function keepAll(files) {
  let done = 0;
  for (const file of files) {
    notice(`Adding ${done + 1} of ${files.length}…`);
    const kept = await state.keepPhoto(file).catch((error) => (api.passing(error) ? Promise.reject(error) : refuse(file, error)));
    if (kept === null) return notice(""); // there is no token
    done += kept?.photos.length ?? 0; // a video has several
  }
  notice(`Added ${plural(done, "photo")} to the session.`);
  setOld(true); // so that these photos are sorted in at once
  await session.fetch();
}

/** Add files to the session, or at the top of the page, where they wait until an index is open. */
export function addFiles(files) {
  const { now } = session;
  if (now && now.index === (state.info?.name ?? now.index) && files[0]?.keyId === undefined) return reported(() => keepAll(files));
  const added = files.map((file) => new Photo(file));
  photos.unshift(...added);
  if (state.info) added.forEach(begin);
  arrange();
  if (added.length === 1 && photos.length === 1) open(added[0]);
}

function begin(photo) {
  photo.forget();
  if (photo.inFolder) return;
  if (state.info.images) ask(photo);
  else photo.problem = new api.Problem("This classifier accepts features, not photos.");
}

// --- display ---

/** Show changed photos. Many answers may arrive in one frame. */
const showSoon = framed(() => (grid.draw(), progress()));

const busy = () => photos.filter((photo) => photo.busy).length;
let wasBusy = false;

function progress() {
  const left = busy();
  $("start").hidden = photos.length > 0;
  $("start-label").hidden = !session.now;
  $("answers").hidden = !photos.length;
  const own = folder();
  const rest = own.filter(({ taught }) => taught === null).length;
  const no_match = photos.filter((photo) => photo.no_match && photo.taught === null).length;
  $("progress").textContent =
    (left ? `${count(photos.length - left)} of ${plural(photos.length, "photo")} done`
      : own.length === photos.length && own.length ? session.now.others || `${plural(rest, "photo")} without a label` : plural(photos.length, "photo")) +
    (no_match ? ` · ${count(no_match)} with no match` : "");
  $("screen-right").hidden = !own.length;
  const done = wasBusy && !left;
  wasBusy = left > 0;
  if (done) {
    resort(photos.filter(({ inFolder }) => !inFolder));
    const [first] = grid.items;
    if (first) say(`${plural(photos.length, "photo")} classified. First: ${first.name}, ${first.shown ? spoken(first) : ""}`);
  }
  if (!left) showUnknown(photos.filter(({ inFolder, feature }) => !inFolder && feature), alike);
  drawer.show();
  showTaught();
  showProblems();
}

const spoken = (photo) => (photo.unanswered ? "no match" : `${photo.winner.label}, ${percent(photo.winner.probability)}`);

/** Show one line for each kind of problem, regardless of how many files have it. */
function showProblems() {
  const lines = [];
  const failed = photos.filter((photo) => photo.problem && api.passing(photo.problem));
  if (failed.length) {
    const without = failed.filter((photo) => !photo.shown).length;
    const waiting = without ? ` ${plural(without, "photo has", "photos have")} not been classified yet.` : "";
    lines.push([`${failed[0].problem.message}${waiting}`, button("Try again", () => askAgain(failed), { id: "again" })]);
  }
  for (const [reason, names] of refused) {
    const some = names.slice(0, 4).join(", ") + (names.length > 4 ? ` and ${names.length - 4} more` : "");
    const dismiss = cross("Dismiss", () => (refused.delete(reason), showProblems()));
    lines.push([`Skipped ${plural(names.length, "file")} (${reason}): ${some}`, dismiss]);
  }
  const other = photos.find((photo) => photo.problem && !api.passing(photo.problem));
  if (other) lines.push([other.problem.message]);
  const shown = lines.map(([text]) => text).join("\n");
  if ($("troubles").dataset.shown === shown) return;
  $("troubles").dataset.shown = shown;
  $("troubles").replaceChildren(...lines.map(([text, ...more]) => el("p", {}, el("span", {}, text), ...more)));
}

function tile(photo, element, text, note) {
  const { shown, winner, taught } = photo;
  const no_match = photo.no_match && taught === null;
  const unanswered = no_match && photo.unanswered;
  for (const [name, is] of Object.entries({ busy: photo.busy, no_match, taught: taught !== null })) element.classList.toggle(name, is);
  const [image] = element.firstChild.children;
  if (photo.picture && image.src !== photo.picture) image.replaceWith(photo.image(240, ""));
  element.title = photo.name;
  Object.assign(element.dataset, { input: photo.name, busy: photo.busy });
  if (shown) Object.assign(element.dataset, { label: winner.label, probability: winner.probability });
  const said = photo.group ?? winner;
  text.textContent = taught ?? (unanswered ? "No match" : (said?.label ?? photo.name));
  if (taught) note.textContent = photo.inFolder ? "labelled" : "added";
  else if (unanswered) note.textContent = "";
  else if (shown) note.textContent = no_match ? "no match" : percent(said.probability);
  else note.textContent = photo.problem ? "no answer" : "classifying…";
  const doubtful = shown && !no_match && !taught && winner.probability < DOUBTFUL;
  element.style.setProperty("--p", doubtful ? winner.probability : 0);
  const isNew = offered().includes(photo);
  element.classList.toggle("same", isNew);
  if (isNew) note.textContent = `${photo.newest.guesses[0].label}?`;
  const [visit, others] = [".visit", ".others"].map((name) => element.querySelector(name));
  visit.textContent = photo.together > 1 ? `× ${count(photo.together)}` : "";
  visit.title = `Select all ${photo.together} photos of this visit`;
  const names = state.info?.changes && taught === null ? photo.choices.slice(0, OTHERS) : [];
  if (others.dataset.names === String(names)) return; // a click on them may have begun
  others.dataset.names = names;
  others.replaceChildren(...names.map((label) => el("span", { title: `This is ${label}`, data: { label } }, label)));
}

// --- sorting, filtering ---

const STATES = { // what to show, and a function that tells whether a photo is shown
  all: ["All", () => true],
  rest: ["Without a label", (photo) => photo.taught === null],
  no_match: ["No match", (photo) => photo.no_match && !photo.taught],
  unsure: ["Below 50 %", (photo) => photo.shown && !photo.no_match && photo.winner.probability < 0.5],
  taught: ["With a label", (photo) => photo.taught !== null],
};
const words = new Intl.Collator(undefined, { numeric: true }); // localeCompare takes 20 times as long
const SORTS = { // an order, and a function that compares two photos
  doubt: ["Least certain first", (a, b) => (a.taught !== null) - (b.taught !== null) || a.rank - b.rank],
  class: ["By class", (a, b) => words.compare(a.kind, b.kind)],
  name: ["By name", (a, b) => words.compare(a.name, b.name)],
  new: ["Newest first", () => 0],
};

const classOf = (photo) => photo.taught ?? (photo.unanswered ? "" : (photo.winner?.label ?? ""));

const together = (some, of) => [...Map.groupBy(some, of).values()].sort((a, b) => b.length - a.length);

/** Sort some photos by their current answers: least certain first, but of each two screens of a session, first the most
 *  frequent answer and, within it, the most frequent second choice. Photos that were seen with the same answer come last.
 *  The others keep their order, because a person is looking at them. */
function resort(some = photos) {
  for (const photo of some) photo.kind = classOf(photo);
  const isSeen = ({ seen, kind }) => seen === kind;
  const rest = some.filter(({ taught }) => taught === null).sort((a, b) => isSeen(a) - isSeen(b) || b.doubt - a.doubt);
  const number = folder().length ? TOGETHER : 1;
  for (let start = 0; start < rest.length; start += number) {
    const answers = together(rest.slice(start, start + number), ({ kind }) => kind);
    const placed = answers.flatMap((own) => together(own, ({ choices }) => choices[0]).flat());
    placed.forEach((photo, i) => (photo.rank = start + i));
  }
  arrange();
}

function arrange() {
  const wanted = $("filter").value.trim().toLowerCase();
  const [, is] = STATES[$("filter-state").value];
  const kept = photos.filter(
    (photo) => is(photo) && (!wanted || `${classOf(photo)}\n${photo.name}`.toLowerCase().includes(wanted)),
  );
  const found = busy() ? kept : kept.sort(SORTS[$("sort").value][1]); // photos keep their places while answers arrive
  grid.show(found);
  $("nothing").hidden = found.length > 0 || !photos.length;
  progress();
}

$("filters").addEventListener("click", () => {
  const open = $("bar").classList.toggle("open");
  $("filters").setAttribute("aria-expanded", String(open));
});
for (const [id, table] of [["sort", SORTS], ["filter-state", STATES]]) {
  $(id).append(...Object.entries(table).map(([value, [text]]) => el("option", { value }, text)));
  $(id).addEventListener("change", turn);
}
$("filter").addEventListener("input", debounced(120, arrange));

// --- one photo ---

function open(photo) {
  drawer.open(photo);
  grid.go(photo);
  if (photo.inFolder && !photo.current) reported(async () => (await photo.fetch(), askAgain([photo])));
}

/** Open the photo that follows the open one in the grid, or precedes it. */
export function step(by) {
  const next = grid.items[grid.items.indexOf(drawer.openPhoto()) + by];
  if (next) open(next);
}

// --- several photos ---

/** Return the names of all classes, including those whose labels are not saved yet. */
export const classNames = () => [...new Set([...state.labels, ...Object.keys(session.now?.classes ?? {})])];

const acting = () => (grid.selected.size ? grid.items.filter((photo) => grid.selected.has(photo)) : grid.active ? [grid.active] : []);

/** Return the three most probable classes of the selected photos, except the class that all of them already have. */
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
  const can = state.info?.changes ?? false;
  $("selection").hidden = !number;
  $("screen-right").disabled = number > 0; // the bar of the selection covers photos
  $("selection-count").textContent = `${number} selected`;
  $("selection-form").hidden = !can;
  $("selection-right").hidden = !can || !acting().some(acceptable);
  $("selection-away").hidden = acting().every(({ inFolder }) => inFolder);
  field.nextElementSibling.textContent = acting().some(({ inFolder }) => inFolder) ? "Label" : "Add as examples";
  const labels = can && number ? new Set([...choices(), ...matching("", classNames())]) : [];
  $("selection-chips").replaceChildren(...chips([...labels].slice(0, CLASSES), (label) => teach(acting(), label)));
}

function teachChoice(i) {
  const label = choices()[i];
  if (label && state.info.changes) teach(acting(), label);
}

const field = classForm($("selection-form"), "", classNames, (label) => {
  $("grid").focus({ preventScroll: true });
  teach(acting(), label);
});
field.addEventListener("keydown", (event) => event.key === "Escape" && $("grid").focus({ preventScroll: true }));
const onScreen = () => grid.onScreen($("bar").getBoundingClientRect().bottom);
$("screen-right").addEventListener("click", ({ detail }) => detail < 2 && acceptAll(onScreen())); // a double click is one answer
$("selection-right").addEventListener("click", () => acceptAll(acting()));
$("selection-none").addEventListener("click", () => (grid.select([]), $("grid").focus()));
$("selection-away").addEventListener("click", () => (putAway(acting()), $("grid").focus()));

const acceptable = (photo) =>
  photo.shown && !photo.unanswered && !photo.group && photo.taught === null && !photo.judgedByOthers && !photo.busy && !(photo.inFolder && isOld());

async function acceptAll(which) {
  if (!state.info.changes) return;
  const since = state.info.version;
  const own = which.filter((photo) => photo.inFolder && acceptable(photo));
  if (own.length > 1) for (const photo of which) photo.seen = classOf(photo);
  if (own.length) relabel(own.map((photo) => [photo, photo.winner.label]), own.length > 1 ? turn : arrange);
  const some = which.filter((photo) => !photo.inFolder && acceptable(photo));
  for (const [label, own] of Map.groupBy(some, ({ winner }) => winner.label)) {
    if (!(await teach(own, label))) return;
  }
  if (some.length) offerUndo(`Added ${plural(some.length, "example photo")} to the classes of their answers.`, some, since);
}

const offerUndo = (text, which, since) => undoable(text, since, state.info.version, () => unmark(which));

function unmark(which) {
  for (const photo of which) photo.taught = null;
  arrange();
}

/** Add photos as examples of a class, and offer to undo this. Return whether they were added. */
export async function teach(all, label) {
  const own = all.filter(({ inFolder }) => inFolder);
  if (own.length) relabel(own.map((photo) => [photo, label]));
  const which = all.filter(({ inFolder }) => !inFolder);
  if (!which.length) return own.length > 0;
  notice("Adding…");
  const report = (done) => which.length > 16 && notice(`Adding ${done} of ${which.length}…`);
  for (const photo of which) photo.taught = label;
  const added = await reported(() => state.add(label, which.map((photo) => photo.file), report));
  if (added === null) notice(""); // there is no token
  if (!added) {
    unmark(which);
    return false;
  }
  grid.select([]);
  arrange();
  if (!added.key_ids.length) return notice(`Nothing was added, because ${label} already has ${added.known === 1 ? "this example" : "these examples"}.`);
  const to = added.classes.length ? `the new class ${label}` : label;
  const twins = added.duplicates.length ? ` Please check: ${added.duplicates.join("; ")}` : "";
  return offerUndo(`Added ${plural(added.key_ids.length, "example photo")} to ${to}.${twins}`, which, added.since);
}

/** Return a function that activates the photo that has taken the place of the first of some photos. */
function next(which) {
  const at = Math.max(0, grid.items.findIndex((photo) => which.includes(photo)));
  return (scroll) => grid.go(grid.items[Math.min(at, grid.items.length - 1)], scroll);
}

function remove(which) {
  const gone = new Set(which);
  for (const photo of gone) photo.gone.abort();
  for (let i = photos.length - 1; i >= 0; i--) if (gone.has(photos[i])) photos.splice(i, 1);
  if (gone.has(drawer.openPhoto())) drawer.close();
  arrange();
}

function putAway(all) {
  const which = all.filter(({ inFolder }) => !inFolder);
  if (!which.length) return;
  const goOn = next(which);
  remove(which);
  if (photos.length) goOn();
  else $("choose").focus();
}

// --- changes of the index and its version ---

state.addEventListener("index", () => {
  leaving.abort();
  leaving = new AbortController();
  $("choose").disabled = !state.info.images;
  $("drop-hint").textContent = state.info.images
    ? "Drop or paste JPEG, PNG or WebP files anywhere on this page. They are only sent to this server."
    : "This classifier has no encoder on this server. It accepts features (POST /v1/classify), not photos.";
  if (session.now && session.now.index !== state.info.name) remove(folder());
  for (const photo of photos) begin(photo);
  arrange();
  told = "";
  showFolder();
});

state.addEventListener("version", () => {
  moving.abort();
  moving = new AbortController();
  askAgain(photos.filter(({ feature, picture, inFolder, busy }) => (feature || picture) && (!inFolder || busy)));
  progress();
  showFolder();
});

picks($("files"), addFiles, $("choose"), $("more"));
picks($("camera-file"), addFiles, $("camera"));
$("clear").addEventListener("click", () => putAway([...photos]));
arrange();

