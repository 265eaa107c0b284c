// The end of a labelling session: folders by class, keywords, or a list or a zip file of all answers.

import { $ } from "./dom.js";
import { session } from "./session.js";
import { state } from "./state.js";

let action = "copy"; // what Undo undoes

async function sort(options) {
  const into = $("finish-into").value.trim();
  $("finish-said").textContent = options.undo ? "Undoing…" : "Working…";
  try {
    const done = await state.sortPhotos({ into, action, ...options });
    const skipped = done?.skipped.map(({ input, reason }) => ` ${input}: ${reason}.`) ?? [];
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
