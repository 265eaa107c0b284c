// The entry point of the page: the views, the first screen, the menu of the classifier, and dropped or pasted files.

import * as api from "./api.js";
import { showScreen } from "./browse.js";
import { addFiles } from "./classify.js";
import { agreed, askName, notice, reported } from "./dialogs.js";
import { $, attempt, button, cut, el, picture, plural } from "./dom.js";
import { showLabelView } from "./label.js";
import { session } from "./session.js";
import { askToken, state } from "./state.js";
import "./take.js";
import * as teach from "./teach.js";

const CHOSEN = "retrieval-tip index";
const CLASSES = 60; // number of classes on the first screen
const TITLES = {
  classify: "Photos", label: "Label", classes: "Classes", check: "Check labels", map: "Map", history: "History", teach: "Teach", settings: "Settings",
};
function route() {
  const view = location.hash.slice(1) in TITLES ? location.hash.slice(1) : "classify";
  for (const name of Object.keys(TITLES)) $(`${name}-view`).hidden = name !== view;
  for (const list of $("key-list").children) list.hidden = list.id !== `${view}-keys`;
  $("keys").hidden = !$(`${view}-keys`);
  for (const link of document.querySelectorAll("nav a")) link.ariaCurrent = link.hash === `#${view}` ? "page" : null;
  document.title = `${TITLES[view]} · ${state.info?.name ?? "retrieval-tip"}`;
  if (view === "label") showLabelView();
  if (view === "classify" && session.now) session.follow();
  if (state.info && showScreen(view)) follow();
}

/** Fetch changes that other users have made. If this fails, they appear with the next answer. */
const follow = () => state.info && state.refresh().catch(() => {});

const choose = (name) =>
  attempt($("problem"), async () => {
    await state.open(name);
    sessionStorage.setItem(CHOSEN, name);
    route();
  });

/** Return the list of classifiers. A private server asks for the token first. */
async function listed() {
  try {
    return await api.request("/v1/indexes");
  } catch (error) {
    if (error.status !== 401 || !(await askToken())) throw error;
    return listed();
  }
}

const start = (prefer = null) =>
  attempt($("problem"), async () => {
    const { indexes: names, changes, makes, labels } = await listed();
    state.mayChange = changes;
    state.dispatchEvent(new Event("indexes"));
    $("tab-label").hidden = !labels;
    document.body.classList.toggle("labelling", labels);
    if (labels && !location.hash) location.hash = "#label"; // this screen fetches the session itself
    if (labels && !session.now && location.hash !== "#label") await session.fetch();
    if (!names.length && state.info) return location.reload(); // the last one was deleted
    $("index-list").replaceChildren(...names.map((name) => el("li", {}, button(name, () => choose(name)))));
    showOpen();
    $("to-teach").hidden = !state.mayChange;
    if (!names.length && !makes) throw new api.Problem("This server has no classifier yet and cannot create one.");
    if (names.length) {
      const wanted = prefer ?? sessionStorage.getItem(CHOSEN);
      return choose(names.includes(wanted) ? wanted : names[0]);
    }
    $("index-facts").textContent = "no classifier yet";
    if (!labels) location.hash = "#teach";
  });

// --- the first screen, which shows the classes with example photos to try ---

async function showStart() {
  const { info, labels } = state;
  $("knows").textContent = `“${info.name}” recognises ${plural(labels.length, "class", "classes")}, learned from ${plural(info.n, "example photo")}`;
  const exemplars = await state.exemplars();
  if (info !== state.info) return;
  $("known-hint").hidden = !info.images || !exemplars.some(({ image }) => image);
  $("known").replaceChildren(...exemplars.slice(0, CLASSES).map(known));
}

/** Return a class with an example photo, which is classified with all other examples if it is clicked. */
function known({ label, class_id: id, key_id: keyId, image }) {
  const onclick = async () => {
    const response = await fetch(`${image}?size=1024`);
    if (!response.ok) return;
    const file = new File([await response.blob()], `${label} ${keyId}.jpg`, { type: "image/jpeg" });
    addFiles([Object.assign(file, { keyId })]);
  };
  const one = picture(image, 160, "");
  const shot = image && state.info.images ? button([one], onclick, { aria: { label: `Try a photo of ${label}` } }) : one;
  const number = el("span", { class: "hint" }, plural(state.info.counts[id], "photo"));
  return el("li", {}, shot, el("span", { class: "name", title: label }, cut(label)), number);
}

// --- the menu of the classifier ---

function showOpen() {
  const { info } = state;
  $("index-name").textContent = cut(info?.name ?? "No classifier yet");
  $("index-name").title = info?.name ?? "";
  $("index-changes").hidden = !info?.changes;
  for (const { firstChild: one } of $("index-list").children) one.setAttribute("aria-current", String(one.textContent === info?.name));
  if (!info) return;
  $("index-facts").textContent = `${plural(info.n, "photo")}, ${plural(info.counts.length, "class", "classes")}`;
  $("index-facts").title = `version ${info.version}`;
}

const change = async (what, call) => (await reported(call)) && notice(what);

$("index-rename").addEventListener("click", async () => {
  const { name } = state.info;
  const other = await askName(`Rename “${name}”`, name, "Rename");
  if (other && other !== name) await change(`Renamed “${name}” to “${other}”.`, () => state.renameIndex(other));
});
$("index-duplicate").addEventListener("click", async () => {
  const { name } = state.info;
  const other = await askName(`Duplicate “${name}”`, `${name} copy`, "Duplicate");
  if (other) await change(`Duplicated “${name}” as “${other}”.`, () => state.duplicateIndex(other));
});
$("index-delete").addEventListener("click", async () => {
  const { name, n, counts } = state.info;
  const text = `Its ${plural(n, "example photo")} in ${plural(counts.length, "class", "classes")} and all its versions are deleted. You cannot undo this.`;
  if (await agreed("confirm", `Delete “${name}”?`, [el("p", {}, text)], "Delete", "danger")) await change(`Deleted “${name}”.`, state.deleteIndex);
});
for (const menu of document.querySelectorAll(".menu")) menu.addEventListener("click", (event) => event.target.closest("button, a") && menu.hidePopover());
for (const event of ["index", "version"]) state.addEventListener(event, () => (showOpen(), showStart()));

// --- dropped and pasted files ---

/** Handle files and folders that were pasted, or dropped on an element. They are examples on the Teach screen, and are
 *  classified on other screens. */
async function receive(transfer, place) {
  const found = await teach.gather(transfer);
  if (!found.length) return;
  if (location.hash === "#teach") return teach.receive(found, place);
  location.hash = "#classify";
  addFiles(found.map(({ file }) => file));
}

const dropping = (is) => document.body.classList.toggle("dropping", is);
const onFiles = (type, handle) => addEventListener(type, (event) => event.dataTransfer?.types.includes("Files") && handle(event));
onFiles("dragleave", ({ relatedTarget }) => relatedTarget ?? dropping(false)); // the pointer has left the window
onFiles("dragover", (event) => {
  event.preventDefault();
  dropping(true);
  teach.aim(event);
});
onFiles("drop", (event) => {
  event.preventDefault();
  dropping(false);
  receive(event.dataTransfer, event.target);
});
addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  receive(event.clipboardData);
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // #main is not a view
  $("main").focus();
});
addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => document.hidden || follow());

state.reopen = start;
route();
start();
