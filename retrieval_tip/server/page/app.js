// The entry point of the page. It handles the views, opens a classifier, and handles dropped or pasted files.

import * as api from "./api.js";
import { showScreen } from "./browse.js";
import { addFiles } from "./classify.js";
import { $, failure } from "./dom.js";
import { placeSettings } from "./drawer.js";
import { gather } from "./files.js";
import { showLabelView } from "./label.js";
import { showMenu } from "./menu.js";
import "./start.js";
import { askToken, state } from "./state.js";
import * as teach from "./teach.js";

const CHOSEN = "retrieval-tip index";
const TABS = { classify: "Photos", label: "Label", classes: "Classes", check: "Check labels", map: "Map", history: "History" };
const TITLES = { ...TABS, teach: "Teach", settings: "Settings" };
const VIEWS = Object.keys(TITLES);

function route() {
  $("overlay").firstElementChild.textContent =
    location.hash === "#teach" ? "Each folder becomes a class. Single photos are added to the marked class." : "Drop your photos here";
  const view = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "classify";
  for (const name of VIEWS) $(`${name}-view`).hidden = name !== view;
  for (const name of Object.keys(TABS)) {
    $(`tab-${name}`).setAttribute("aria-selected", String(name === view));
    $(`tab-${name}`).tabIndex = name === (view in TABS ? view : "classify") ? 0 : -1;
  }
  placeSettings();
  document.title = `${TITLES[view]} · ${state.info?.name ?? "retrieval-tip"}`;
  if (view === "label") showLabelView();
  if (state.info && showScreen(view)) follow();
}

/** Fetch changes that other users have made. If this fails, they appear with the next answer. */
const follow = () => state.info && state.refresh().catch(() => {});

async function choose(name) {
  $("problem").replaceChildren();
  try {
    await state.open(name);
    sessionStorage.setItem(CHOSEN, name);
    route();
  } catch (error) {
    $("problem").replaceChildren(failure(error, () => choose(name)));
  }
}

async function start(prefer = null) {
  $("problem").replaceChildren();
  try {
    const { indexes: served, makes, labels } = await api.indexes();
    const names = served.map(({ name }) => name);
    state.mayChange = makes || served.some(({ changes }) => changes);
    state.dispatchEvent(new Event("indexes"));
    $("tab-label").hidden = !labels;
    if (labels && !location.hash) location.hash = "#label";
    if (!names.length && state.info) return location.reload(); // the last one was deleted
    showMenu(names, choose);
    $("to-teach").hidden = !state.mayChange;
    if (!names.length && !makes) throw new api.Problem("This server has no classifier yet and cannot create one.");
    if (!names.length) {
      $("index-facts").textContent = "no classifier yet";
      if (!labels) location.hash = "#teach";
      return;
    }
    const wanted = prefer ?? sessionStorage.getItem(CHOSEN);
    const chosen = names.includes(wanted) ? wanted : names[0];
    await choose(chosen);
  } catch (error) {
    if (error.status === 401 && (await askToken())) return start(prefer);
    $("problem").replaceChildren(failure(error, () => start(prefer)));
  }
}

/** Handle files and folders that were pasted, or dropped on an element. They are examples on the Teach screen, and
 *  are classified on other screens. */
async function receive(transfer, place) {
  const found = await gather(transfer);
  if (!found.length) return;
  if (location.hash === "#teach") return teach.receive(found, place);
  location.hash = "#classify";
  addFiles(found.map(({ file }) => file));
}

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
let depth = 0; // dragenter and dragleave fire for every element that the pointer crosses
const dropping = (by) => {
  depth = by ? Math.max(0, depth + by) : 0;
  document.body.classList.toggle("dropping", depth > 0);
  if (!depth) teach.aim(null);
};
addEventListener("dragenter", (event) => carriesFiles(event) && dropping(1));
addEventListener("dragleave", (event) => carriesFiles(event) && dropping(-1));
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  if (location.hash === "#teach") teach.aim(event);
});
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  dropping(0);
  receive(event.dataTransfer, event.target);
});
addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  receive(event.clipboardData);
});

document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === " ") (event.preventDefault(), document.activeElement.click());
  const shown = Object.keys(TABS).filter((name) => !$(`tab-${name}`).hidden);
  const at = shown.findIndex((name) => $(`tab-${name}`) === document.activeElement);
  if (!step || at < 0) return;
  event.preventDefault();
  const name = shown[(at + step + shown.length) % shown.length];
  location.hash = `#${name}`;
  $(`tab-${name}`).focus();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // #main is not a view
  $("main").focus();
});
addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => document.hidden || follow());
state.addEventListener("made", (event) => (event.detail.done = start(event.detail.name)));

$("help").addEventListener("click", () => $("glossary").showModal());

route();
start();
