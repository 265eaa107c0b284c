// The classify view: the images on the page, and what the server is asked about them.

import * as api from "./api.js";
import { Card, parameters } from "./card.js";
import { $, debounced, plural, say } from "./dom.js";
import { settings } from "./settings.js";
import { state } from "./state.js";

const BLOCK = 8; // features a request: the evidence of one may be a megabyte

const cards = [];
let leaving = new AbortController(); // aborts what was asked of an index that is no longer shown
let moving = new AbortController(); // aborts what was asked for settings that were moved on

/** Ask the server about images that it has seen, by their features: with evidence where the index has changed. */
async function askAgain(asked, { evidence = true, signal = leaving.signal } = {}) {
  const { name } = settings;
  if (evidence) asked.forEach((card) => card.working(""));
  const blocks = [];
  for (let i = 0; i < asked.length; i += BLOCK) blocks.push(asked.slice(i, i + BLOCK));
  await Promise.all(
    blocks.map(async (block) => {
      const waiting = (problem) =>
        evidence && block.forEach((card) => card.working(`${problem.message} Trying again…`));
      try {
        const answer = await api.classifyFeatures(
          block.map((card) => card.evidence.feature),
          block.map((card) => card.file.name),
          { index: state.info.name, ...parameters(), evidence },
          { signal, waiting },
        );
        await Promise.all(block.map((card, i) => cards.includes(card) && card.take(answer, answer.results[i], name)));
      } catch (error) {
        if (error.name !== "AbortError") block.forEach((card) => card.fail(error));
      }
    }),
  );
}

/** Put images on the page, the first of them on top. Before the index is there they wait for it. */
export function addFiles(files) {
  const added = files.map((file) => new Card(file, view));
  cards.unshift(...added);
  $("cards").prepend(...added.map((card) => card.element));
  if (state.info) added.forEach((card) => card.begin());
  progress();
}

/** Take an image off the page. The focus goes to its neighbour. */
function putAway(card) {
  const at = cards.indexOf(card);
  card.gone.abort();
  card.element.remove();
  cards.splice(at, 1);
  (cards[at] ?? cards[at - 1])?.remove.focus();
  if (!cards.length) $("choose").focus();
  progress();
}

function progress() {
  const busy = cards.filter((card) => card.busy).length;
  $("summary").hidden = !cards.length;
  $("classify-view").classList.toggle("some", cards.length > 0);
  $("progress").textContent = `${plural(cards.length, "image")}${busy ? `, ${busy} to go` : ""}`;
  const estimates = cards.some((card) => card.shown?.how === "estimate");
  $("exactness").textContent = estimates ? "Estimate; asking the server…" : "";
  if (busy || !cards[0]?.shown) return;
  const others = cards.length > 1 ? `; ${cards.length} images in all` : "";
  say(`${cards[0].file.name}: ${cards[0].verdict.textContent}, ${cards[0].probability.textContent}${others}`);
}

/** What cards know of the view. */
const view = {
  get left() {
    return leaving.signal;
  },
  changed: progress,
  unsure: () => askWhenStill(),
  outdated: (card) => askAgain([card]),
  putAway,
};

let frame = 0;
settings.addEventListener("change", () => {
  moving.abort();
  moving = new AbortController();
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => cards.forEach((card) => card.render()));
  askWhenStill();
});

/** What the page cannot compute is asked of the server, once the settings have been still. */
const askWhenStill = debounced(200, () => {
  const asked = cards.filter((card) => card.current && card.shown?.how === "estimate");
  if (asked.length) askAgain(asked, { evidence: false, signal: AbortSignal.any([moving.signal, leaving.signal]) });
});

state.addEventListener("index", () => {
  leaving.abort();
  leaving = new AbortController();
  $("drop-hint").textContent = state.info.images
    ? "Several at once, anywhere on this page. They are sent to this server only."
    : "This index has no backbone here: it takes features (POST /v1/classify), not images.";
  $("choose").disabled = !state.info.images;
  for (const card of cards) card.begin();
});

state.addEventListener("version", () => {
  const seen = cards.filter((card) => card.evidence);
  for (const card of seen) card.before = card.shown;
  askAgain(seen);
});

$("choose").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  addFiles([...$("files").files]);
  $("files").value = ""; // the same file may be chosen again
});
$("clear").addEventListener("click", () => {
  for (const card of [...cards]) putAway(card);
});
