// Groups of similar photos that have no match. Naming a group creates a class.

import * as api from "./api.js";
import { classNames, teach } from "./classify.js";
import { classForm } from "./dialogs.js";
import { $, button, count, el, failure, plural } from "./dom.js";
import { state } from "./state.js";

const MOST = 4096; // number of photos that the server groups at once
const BYTES = 32 << 20; // size of a request
const GROUPS = 5; // number of groups to show
const LEAST = 4; // smallest group of photos of a folder to show, because other photos can be selected as quickly
const SHOWN = 48; // number of photos to show per group

let asked = ""; // the photos that are grouped, or are being grouped. Nothing else replaces a form with a typed name.

/** Group the photos that have no match, and show the groups, after groups that are `known` already. */
export async function showUnknown(photos, known) {
  const isUnknown = (photo) => photo.no_match && photo.taught === null;
  const no_match = photos.filter(isUnknown);
  const groups = known.map((some) => some.filter(isUnknown)).filter((some) => some.length >= LEAST).slice(0, GROUPS);
  const now = [state.info?.name, no_match.length && state.info.version, ...[...groups, no_match].flat().map(({ id }) => id)].join();
  if (now === asked) return;
  asked = now;
  const again = () => ((asked = ""), showUnknown(photos, known));
  const found = no_match.length > 1 && state.info.changes ? await grouped(no_match, again) : [];
  const shown = [...groups.map(row), ...found];
  if (now !== asked) return;
  $("unknown").hidden = !shown.length;
  $("unknown-list").replaceChildren(...shown);
}

/** Return the groups, or the reason why there are none, as items of a list. */
async function grouped(no_match, again) {
  const some = no_match.slice(0, Math.min(MOST, Math.floor(BYTES / (4 * no_match[0].feature.length))));
  const others = `The first ${count(some.length)} of ${count(no_match.length)} photos without a match were grouped.`;
  try {
    const groups = await state.get("/groups", {}, api.floats(some.map(({ feature }) => feature)));
    const rows = groups.slice(0, GROUPS).map((places) => row(places.map((place) => some[place])));
    return some.length < no_match.length ? [...rows, el("li", { class: "hint" }, others)] : rows;
  } catch (error) {
    return [el("li", {}, failure({ message: `Photos without a match could not be grouped: ${error.message}` }, again))];
  }
}

function row(photos) {
  const left = new Set(photos); // without those that were clicked
  const form = el("form", { class: "teach" });
  classForm(form, "Name this class", classNames, (label) => teach([...left], label));
  const title = el("strong");
  const tell = () => (title.textContent = `${plural(left.size, "similar photo")} without a match`);
  const flip = (photo) => ({ currentTarget: pressed }) => {
    if (!left.delete(photo)) left.add(photo);
    pressed.ariaPressed = String(left.has(photo));
    tell();
  };
  const picture = (photo) => button([photo.image(160, photo.name)], flip(photo), { title: "Leave out or include", ariaPressed: "true" });
  tell();
  const items = photos.slice(0, SHOWN).map((photo) => el("li", {}, picture(photo)));
  const more = photos.length > SHOWN ? el("li", { class: "hint" }, `and ${count(photos.length - SHOWN)} more`) : null;
  return el("li", {}, title, el("ul", { class: "strip" }, ...items, more), form);
}
