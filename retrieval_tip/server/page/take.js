// What a person takes away: a table or a zip file of the photos on the page, and folders by class or keywords at the end
// of a labelling session.

import { $, el, plural } from "./dom.js";
import { notice, reported } from "./notice.js";
import { session } from "./session.js";
import { state } from "./state.js";
import { classFolder, safe, zip } from "./zip.js";

let photos = () => []; // returns the photos that are shown, in order
export const setUp = (shown) => (photos = shown);

const answered = () => photos().filter(({ shown, taught }) => shown || taught !== null);

/** Return a CSV cell. A leading quote prevents spreadsheets from evaluating text as a formula. */
function cell(value) {
  const text = value === null ? "" : String(value);
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function download(name, type, ...parts) {
  const url = URL.createObjectURL(new Blob(parts, { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

$("download-csv").addEventListener("click", () => {
  const row = ({ path, name, winner, taught, no_match }) => [path ?? name, winner?.label ?? taught, winner?.probability ?? null, no_match, taught];
  const lines = [["input", "label", "probability", "no_match", "taught"], ...answered().map(row)];
  download(`${state.info.name}.csv`, "text/csv", `${lines.map((line) => line.map(cell).join(",")).join("\n")}\n`);
});

const SURE = 0.5; // below this probability, an answer is more likely wrong than right
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

$("download-zip").addEventListener("click", async () => {
  const some = answered();
  $("download-zip").disabled = true;
  await reported(async () => {
    const pairs = [];
    for (const [path, photo] of sortedPaths(some)) pairs.push([path, await photo.original()]);
    const sorted = await zip(pairs, (done) => notice(`Packing ${done} of ${some.length}…`));
    download(`${state.info.name}.zip`, "application/zip", sorted);
    notice(`Packed ${plural(some.length, "photo")} into folders by class.`);
  });
  $("download-zip").disabled = false;
});

// --- the end of a labelling session ---

let action = "copy"; // what Undo undoes

async function sort(options) {
  const into = $("finish-into").value.trim();
  $("finish-said").textContent = options.undo ? "Undoing…" : "Working…";
  try {
    const done = await state.sortPhotos({ into, action, ...options });
    const skipped = done?.skipped.map(({ source, reason }) => ` ${source}: ${reason}.`) ?? [];
    $("finish-said").textContent = done ? `${done.summary}.${skipped.join("")}${options.undo ? "" : ` To undo this later, run: ${done.undo}`}` : "";
    $("finish-undo").hidden = !done || options.undo;
  } catch (error) {
    $("finish-said").textContent = error.message;
  }
}

$("finish-open").addEventListener("click", () => {
  $("finish-into").value ||= `${session.now.index}-sorted`;
  $("finish-said").textContent = "";
  $("finish-undo").hidden = true;
  $("finish").showModal();
});
$("finish-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const what = new FormData(event.target).get("finish");
  const wrong = $("finish-wrong").value;
  const labelled = what === "labelled";
  action = labelled ? "copy" : what;
  sort({ labelled, at_most_wrong: wrong ? Number(wrong) / 100 : null });
});
$("finish-form").addEventListener("change", () => {
  const into = $("finish-into");
  into.disabled = into.parentElement.hidden = $("finish-xmp").checked;
});
$("finish-undo").addEventListener("click", () => sort({ undo: true }));
$("finish-close").addEventListener("click", () => $("finish").close());
for (const kind of ["zip", "csv"])
  $(`finish-${kind}`).addEventListener("click", () => {
    $("finish").close();
    $("filter-state").value = "all"; // the download contains the photos that are shown
    $("filter-state").dispatchEvent(new Event("change"));
    $(`download-${kind}`).click();
  });
