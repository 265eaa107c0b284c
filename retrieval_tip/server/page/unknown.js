// Groups of similar photos that have no match. Naming a group creates a class.

import * as api from "./api.js";
import { $, el, plural } from "./dom.js";
import { state } from "./state.js";

const MOST = 1000; // number of photos to group, so that they fit into one request
const GROUPS = 5; // number of groups to show
const SHOWN = 12; // number of photos to show per group

let asked = ""; // the photos that are grouped, or are being grouped

/** Group the photos that have no match, and show the groups. `teach(photos, label)` is called when a group is named. */
export async function showUnknown(photos, teach) {
  const unlike = photos.filter((photo) => photo.unlike && !photo.taught && photo.evidence).slice(0, MOST);
  const now = [state.info?.name, state.info?.version, ...unlike.map(({ id }) => id)].join();
  if (now === asked) return;
  asked = now;
  const groups = unlike.length > 1 && state.info.changes ? await grouped(unlike) : [];
  if (now !== asked) return;
  $("unknown").hidden = !groups.length;
  $("unknown-list").replaceChildren(...groups.slice(0, GROUPS).map((some) => row(some, teach)));
}

async function grouped(unlike) {
  try {
    const { groups } = await api.groups(state.info.name, unlike.map(({ evidence }) => evidence.feature));
    return groups.map((places) => places.map((place) => unlike[place]));
  } catch {
    asked = ""; // the photos are still in the grid, and the next answer tries again
    return [];
  }
}

function row(photos, teach) {
  const label = el("input", { autocomplete: "off", maxLength: 1024, placeholder: "class name", aria: { label: "Class name" } });
  label.setAttribute("list", "class-names");
  const form = el("form", { class: "teach" }, label, el("button", { type: "submit" }, "Name this class"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (label.value.trim()) teach(photos, label.value.trim());
  });
  const pictures = photos.slice(0, SHOWN).map(({ file, name }) => {
    const url = URL.createObjectURL(file);
    const image = el("img", { alt: name, src: url });
    for (const event of ["load", "error"]) image.addEventListener(event, () => URL.revokeObjectURL(url), { once: true });
    return el("li", {}, image);
  });
  return el("li", {}, el("strong", {}, `${plural(photos.length, "similar photo")} without a match`), el("ul", { class: "strip" }, ...pictures), form);
}
