// Groups of similar photos that have no match. Naming a group creates a class.

import * as api from "./api.js";
import { $, classField, count, el, failure, named, noPreview, plural, preview } from "./dom.js";
import { state } from "./state.js";

const MOST = 4096; // number of photos that the server groups at once
const BYTES = 32 << 20; // size of a request
const GROUPS = 5; // number of groups to show
const SHOWN = 12; // number of photos to show per group

let asked = ""; // the photos that are grouped, or are being grouped

/** Group the photos that have no match, and show the groups. `teach(photos, label)` is called when a group is named. */
export async function showUnknown(photos, teach) {
  const unlike = photos.filter((photo) => photo.unlike && !photo.taught);
  const now = [state.info?.name, state.info?.version, ...unlike.map(({ id }) => id)].join();
  if (now === asked) return;
  asked = now;
  const shown = unlike.length > 1 && state.info.changes ? await grouped(unlike, teach, () => ((asked = ""), showUnknown(photos, teach))) : [];
  if (now !== asked) return;
  $("unknown").hidden = !shown.length;
  $("unknown-list").replaceChildren(...shown);
}

/** Return the groups, or the reason why there are none, as items of a list. */
async function grouped(unlike, teach, again) {
  const some = unlike.slice(0, Math.min(MOST, Math.floor(BYTES / (4 * unlike[0].feature.length))));
  const others = `The first ${count(some.length)} of ${count(unlike.length)} photos without a match were grouped.`;
  try {
    const { groups } = await api.groups(state.info.name, some.map(({ feature }) => feature));
    const rows = groups.slice(0, GROUPS).map((places) => row(places.map((place) => some[place]), teach));
    return some.length < unlike.length ? [...rows, el("li", { class: "hint" }, others)] : rows;
  } catch (error) {
    return [el("li", {}, failure({ message: `Photos without a match could not be grouped: ${error.message}` }, again))];
  }
}

function row(photos, teach) {
  const field = classField({ maxLength: 1024, placeholder: "class name", aria: { label: "Class name" } });
  const form = named(el("form", { class: "teach" }, field, el("button", {}, "Name this class")), (label) => teach(photos, label));
  const pictures = photos.slice(0, SHOWN).map(({ file, name }) => el("li", {}, preview(file, name, noPreview())));
  return el("li", {}, el("strong", {}, `${plural(photos.length, "similar photo")} without a match`), el("ul", { class: "strip" }, ...pictures), form);
}
