// Starts the page: routes, the choice of an index, and images that are dropped or pasted anywhere.

import * as api from "./api.js";
import { showIndexView } from "./browse.js";
import { addFiles } from "./classify.js";
import { $, el, failure, plural } from "./dom.js";
import { state } from "./state.js";

const CHOSEN = "retrieval-tip index";
const VIEWS = ["classify", "index"];

function route() {
  const view = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "classify";
  for (const name of VIEWS) {
    const tab = $(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === view));
    tab.tabIndex = name === view ? 0 : -1;
    $(`${name}-view`).hidden = name !== view;
  }
  document.title = `${view === "index" ? "Index" : "Classify"} · ${state.info?.name ?? "retrieval-tip"}`;
  if (view === "index" && state.info) {
    showIndexView();
    follow();
  }
}

/** Somebody else may have changed the index meanwhile. Where that cannot be asked, the next answer will say so. */
const follow = () => state.info && state.refresh().catch(() => {});

function facts() {
  const { n_keys: n, n_classes: c, version } = state.info;
  $("index-facts").textContent = `${plural(n, "key")}, ${plural(c, "class", "classes")}, version ${version}`;
}

async function choose(name) {
  $("problem").hidden = true;
  try {
    await state.open(name);
    sessionStorage.setItem(CHOSEN, name);
    route();
  } catch (error) {
    $("problem").replaceChildren(failure(error, () => choose(name)));
    $("problem").hidden = false;
  }
}

async function start() {
  $("problem").hidden = true;
  try {
    const served = await api.indexes();
    const names = served.map(({ name }) => name);
    if (!names.length) throw new api.Problem("This server serves no index.");
    const chosen = names.includes(sessionStorage.getItem(CHOSEN)) ? sessionStorage.getItem(CHOSEN) : names[0];
    $("index-select").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    $("index-select").value = chosen;
    $("index-select").hidden = $("index-label").hidden = names.length < 2;
    await choose(chosen);
  } catch (error) {
    $("problem").replaceChildren(failure(error, start));
    $("problem").hidden = false;
  }
}

/** Files that were dropped or pasted; what comes with them that is no file is said. */
function receive(transfer) {
  const entries = [...(transfer.items ?? [])].filter((item) => item.kind === "file");
  const folders = entries.filter((item) => item.webkitGetAsEntry?.()?.isDirectory).length;
  const files = [...transfer.files].filter((_, i) => !entries[i]?.webkitGetAsEntry?.()?.isDirectory);
  $("problem").textContent = "Folders are not opened here: drop the images in them.";
  $("problem").hidden = !folders;
  if (!files.length) return;
  location.hash = "#classify";
  addFiles(files);
}

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
let depth = 0; // dragenter and dragleave come for every element on the way
const dropping = (by) => {
  depth = by ? Math.max(0, depth + by) : 0;
  document.body.classList.toggle("dropping", depth > 0);
};
addEventListener("dragenter", (event) => carriesFiles(event) && dropping(1));
addEventListener("dragleave", (event) => carriesFiles(event) && dropping(-1));
addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  dropping(0);
  receive(event.dataTransfer);
});
addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  receive(event.clipboardData);
});

document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
  const at = VIEWS.findIndex((name) => $(`tab-${name}`) === document.activeElement);
  if (event.key === " ") (event.preventDefault(), document.activeElement.click());
  if (!step || at < 0) return;
  event.preventDefault();
  const name = VIEWS[(at + step + VIEWS.length) % VIEWS.length];
  location.hash = `#${name}`;
  $(`tab-${name}`).focus();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // #main is no route
  $("main").focus();
});
addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => document.hidden || follow());
$("index-select").addEventListener("change", () => choose($("index-select").value));
state.addEventListener("index", facts);
state.addEventListener("version", facts);

route();
start();
