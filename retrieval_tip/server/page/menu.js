// The menu of the classifier: its name and facts, the other classifiers, and changes of the classifier as a whole.

import { $, button, cut, el, plural } from "./dom.js";
import { askName, confirmed } from "./dialogs.js";
import { notice, reported } from "./notice.js";
import { state } from "./state.js";

let names = []; // of all classifiers

/** List the classifiers of the server. `choose(name)` opens one. */
export function showMenu(all, choose) {
  names = all;
  $("index-list").replaceChildren(...names.map((name) => el("li", {}, button(name, () => choose(name)))));
  showOpen();
}

function showOpen() {
  const { info } = state;
  $("index-name").textContent = cut(info?.name ?? "No classifier yet");
  $("index-name").title = info?.name ?? "";
  $("index-changes").hidden = !info?.changes;
  for (const { firstChild: one } of $("index-list").children) one.setAttribute("aria-current", String(one.textContent === info?.name));
  if (!info) return;
  $("index-facts").textContent = `${plural(info.n_keys, "photo")}, ${plural(info.n_classes, "class", "classes")}`;
  $("index-facts").title = `version ${info.version}`;
  $("index-facts").dataset.version = info.version;
}

const change = async (what, call) => (await reported(call)) && notice(what);

const taken = (name) => (names.includes(name) && name !== state.info.name ? `“${name}” already exists.` : "");

$("index-rename").addEventListener("click", async () => {
  const { name } = state.info;
  const other = await askName(`Rename “${name}”`, name, "Rename", taken);
  if (other && other !== name) await change(`Renamed “${name}” to “${other}”.`, () => state.renameIndex(other));
});
$("index-duplicate").addEventListener("click", async () => {
  const { name } = state.info;
  let free = `${name} copy`;
  for (let number = 2; names.includes(free); number++) free = `${name} copy ${number}`;
  const other = await askName(`Duplicate “${name}”`, free, "Duplicate", taken);
  if (other) await change(`Duplicated “${name}” as “${other}”.`, () => state.duplicateIndex(other));
});
$("index-delete").addEventListener("click", async () => {
  const { name, n_keys: n, n_classes: c } = state.info;
  const text = `Its ${plural(n, "example photo")} in ${plural(c, "class", "classes")} and all its versions are deleted. You cannot undo this.`;
  if (await confirmed(`Delete “${name}”?`, text, "Delete", { kind: "danger" })) await change(`Deleted “${name}”.`, state.deleteIndex);
});
for (const menu of document.querySelectorAll(".menu")) menu.addEventListener("click", (event) => event.target.closest("button, a") && menu.hidePopover());
for (const event of ["index", "version"]) state.addEventListener(event, showOpen);
