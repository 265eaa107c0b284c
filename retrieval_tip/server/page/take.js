// What a person takes away: a table or a zip of the photos on the page, and folders or keywords at the end of a session.

import { photos } from "./classify.js";
import { $, count, debounced, el, percent, plural } from "./dom.js";
import { session } from "./session.js";
import { state } from "./state.js";
import { classFolder, safe, zip } from "./zip.js";

const SURE = 0.5; // below this probability, an answer is more likely wrong than right
let asked = null; // what Finish does, if it is known
let finished = null; // what Undo undoes

const answered = () => photos.filter(({ shown, taught }) => shown || taught !== null);
const tell = (...texts) => $("finish-said").replaceChildren(...texts.flat());

/** Do some work, and tell its result, or the reason why it failed. */
async function told(work) {
  tell("Working…");
  await work().then(tell, ({ message }) => tell(message));
}

/** Return a CSV cell. A leading quote prevents spreadsheets from evaluating text as a formula. */
function cell(value) {
  const text = value === null ? "" : String(value);
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function download(suffix, type, ...parts) {
  const url = URL.createObjectURL(new Blob(parts, { type }));
  el("a", { href: url, download: `${state.info.name}.${suffix}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function table() {
  const row = ({ path, name, winner, taught, no_match }) => [path ?? name, winner?.label ?? taught, winner?.probability ?? null, no_match, taught];
  const lines = [["input", "label", "probability", "no_match", "taught"], ...answered().map(row)];
  download("csv", "text/csv", `${lines.map((line) => line.map(cell).join(",")).join("\n")}\n`);
  return `Listed ${plural(lines.length - 1, "photo")}.`;
}

function folderOf({ taught, no_match, winner }) {
  if (taught === null && no_match) return "no match";
  if (taught === null && winner.probability < SURE) return "not sure";
  return classFolder(taught ?? winner.label);
}

/** Return the path of each photo in the folder of its class. If a path is taken, a number is added. */
function sortedPaths(some) {
  const taken = new Set();
  return some.map((photo) => {
    const [, stem, suffix] = /^(.*?)(\.[^.]*)?$/s.exec(safe(photo.name));
    for (let number = 1; ; number++) {
      const path = `${folderOf(photo)}/${stem}${number > 1 ? `-${number}` : ""}${suffix ?? ""}`;
      if (taken.has(path.toLowerCase())) continue;
      taken.add(path.toLowerCase());
      return [path, photo];
    }
  });
}

async function packed() {
  const pairs = [];
  for (const [path, photo] of sortedPaths(answered())) pairs.push([path, await photo.original()]);
  download("zip", "application/zip", await zip(pairs, (done) => tell(`Packing ${done} of ${pairs.length}…`)));
  return `Packed ${plural(pairs.length, "photo")} into folders by class.`;
}

/** Sort the photos of the session into folders, write keywords, or undo this. */
const sort = (undo) =>
  told(async () => {
    finished = undo ? finished : asked;
    const done = await state.sortPhotos({ ...finished, undo });
    if (!done) return ""; // there is no token
    $("finish-undo").hidden = undo;
    for (const id of ["finish-go", "finish-open"]) $(id).classList.toggle("primary", undo);
    const skipped = done.skipped.map(({ source, reason }) => ` ${source}: ${reason}.`);
    return [`${done.summary}. ${done.promise ?? ""}`, ...skipped, ...(undo ? [] : [" To undo this later, run ", el("code", {}, done.undo)])];
  });

/** Read what to do, and show the folder and the number of photos that are set aside, before Finish can be pressed. */
async function plan() {
  if (!session.now) return;
  const what = new FormData($("finish-form")).get("finish");
  const [into, wrong, labelled, xmp] = [$("finish-into"), $("finish-wrong").value, what === "labelled", what === "xmp"];
  into.disabled = into.parentElement.hidden = xmp;
  const mine = { into: into.value.trim(), action: labelled ? "copy" : what, labelled, at_most_wrong: wrong ? Number(wrong) / 100 : null };
  asked = mine;
  await told(async () => {
    const done = await state.sortPhotos({ ...mine, dry_run: true });
    if (asked !== mine || !done) return "";
    if (document.activeElement !== into) into.value = done.folder;
    $("finish-go").disabled = false;
    $("finish-go").classList.add("primary");
    const { "not sure": unsure, "no match": none } = done.aside;
    const aside = [unsure && `${count(unsure)} below ${percent(done.least ?? SURE)} (“not sure”)`, none && `${count(none)} without a match (“no match”)`];
    const apart = aside.filter(Boolean).join(" and ");
    const goal = xmp ? `${plural(done.photos, "photo")} can get keywords.` : `${plural(done.photos, "photo")} go to ${done.folder}.`;
    const { others, photos: all } = session.now;
    const of = plural(all - session.labelled, "photo");
    const outlook = labelled || !others ? "" : `${others}${apart && ", including those set aside"}.`;
    return `${goal} ${apart ? `Set aside: ${apart}, of ${of} without a label.` : "None is set aside."} ${done.promise ?? outlook}`;
  });
}
const planSoon = debounced(300, plan);

function replan() {
  tell();
  asked = null;
  $("finish-go").disabled = true;
  planSoon();
}

$("finish-open").addEventListener("click", () => {
  $("finish-folders").hidden = $("finish-go").hidden = !session.now;
  $("finish-into").value ||= `${session.now?.index}-sorted`;
  $("finish-undo").hidden = true;
  $("finish").showModal();
  replan();
});
$("finish-form").addEventListener("input", replan);
$("finish-form").addEventListener("submit", (event) => (event.preventDefault(), sort(false)));
$("finish-undo").addEventListener("click", () => sort(true));
$("finish-close").addEventListener("click", () => $("finish").close());
$("finish-csv").addEventListener("click", () => told(table));
$("finish-zip").addEventListener("click", () => told(packed));
