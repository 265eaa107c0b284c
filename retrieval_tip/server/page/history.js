// The versions of a classifier: grouped by sitting, with photos that changed, and a preview before one is restored.

import { agreed } from "./dialogs.js";
import { $, button, el, nameOf, picture, plural } from "./dom.js";
import { state } from "./state.js";

const SITTING = 30 * 60_000; // ms without a change after which another sitting begins
const SHOWN = 4; // photos of each version
const WHAT = { added: "Come back:", moved: "Change:", removed: "Go:" };
const hour = new Intl.DateTimeFormat("en", { timeStyle: "short" });
const day = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });

/** Return the versions of the index, oldest first, with their `changes`. */
export async function fetchHistory() {
  const versions = await state.get("/history");
  const changesOf = async (one) => ({ ...one, changes: await state.get(`/history/${one.version}`, { since: one.parent ?? undefined }).catch(() => []) });
  return Promise.all(versions.map(changesOf));
}

/** Show versions, newest first. `changed` makes a change, as in `browse.js`. */
export function showHistory(versions, changed) {
  const sittings = [];
  for (const one of versions) {
    one.at = new Date(one.created_at);
    if (!(one.at - sittings.at(-1)?.at(-1).at <= SITTING)) sittings.push([]);
    sittings.at(-1).push(one);
  }
  const group = (sitting) => [
    el("h3", {}, day.formatRange(sitting[0].at, sitting.at(-1).at)),
    el("ol", { reversed: true }, ...sitting.toReversed().map((one) => line(one, changed))),
  ];
  $("history").replaceChildren(...sittings.toReversed().flatMap(group));
}

function line({ version, change, at, keys, classes, current, changes }, changed) {
  const photos = changes.flatMap((one) => one.photos).slice(0, SHOWN);
  const call = () => state.rollback(version, state.info.version);
  const restore = async () => (await previewed(version)) && changed(`Restored version ${version}`, call, $("history-title"));
  const facts = `${plural(keys, "photo")}, ${plural(classes, "class", "classes")}`;
  const what = [
    el("p", { class: "name" }, change === "build" ? "created" : change),
    photos.length ? pictures(photos) : null,
    el("p", { class: "hint", title: `version ${version}` }, facts),
  ];
  const action = current ? el("span", { class: "hint" }, "current") : state.info.changes ? button("Restore", restore, { class: "quiet" }) : "";
  return el("li", {}, el("span", { class: "hint" }, hour.format(at)), el("div", {}, ...what), action);
}

const pictures = (photos) =>
  el("p", { class: "pictures" }, ...photos.map(({ image, label, source }) => picture(image, 112, `${label}: ${nameOf(source)}`)));

/** Show how the photos change if a version is restored. Return whether the user agrees. */
async function previewed(version) {
  const found = await state.get(`/history/${version}`, { since: state.info.version }).catch((error) => error.message);
  const kept = "The current version stays in the history, so you can undo this.";
  const part = ({ what, change, photos }) => [el("p", {}, el("strong", {}, WHAT[what]), ` ${change}`), pictures(photos)];
  const parts = typeof found === "string" ? [el("p", {}, found)] : found.flatMap(part);
  const content = parts.length ? parts : [el("p", {}, "All photos keep their classes.")];
  return agreed("restore", "Restore this version?", [...content, el("p", { class: "hint" }, kept)], "Restore");
}
