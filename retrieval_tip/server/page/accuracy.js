// The accuracy of a classifier on its own example photos, each answered by the others. There is an estimate from its
// last fit, and one for the current examples. The accuracy on the other photos of a folder is in session.js.

import { pause } from "./api.js";
import { $, calm, percent, whole } from "./dom.js";
import { state } from "./state.js";

const STEP = 150; // ms for which each number is shown while the accuracy counts up or down
let shown = null; // the index whose accuracy is in the header, and the accuracy

const known = (accuracy) => typeof accuracy?.photos === "number";

/** Return a sentence about an accuracy, or "" if the accuracy is unknown. */
export function judged(accuracy) {
  if (!known(accuracy)) return "";
  const { photos, words, both, tested, classes } = accuracy;
  const some = tested < classes ? `Only ${tested} of ${classes} classes could be tested. ` : "";
  const parts = words === null ? "" : ` Photos alone: ${percent(photos)}; class names alone: ${percent(words)}.`;
  return `${some}Accuracy on the examples: ${percent(both ?? photos)} (each was classified by the others).${parts}`;
}

/** Show the accuracy above the classes, and in the header with its interval, where it counts from the last known one. */
async function show({ type }) {
  const { info } = state;
  const { fit } = info.provenance;
  const tell = (accuracy) => ($("index-judged").textContent = judged(accuracy));
  if (type === "index") tell(fit);
  const now = await state.accuracy();
  if (info !== state.info) return;
  tell(known(now) ? now : fit);
  $("index-accuracy").hidden = !known(now);
  if (!known(now)) return;
  let from = shown?.name === info.name && !calm.matches ? shown.both : now.both;
  shown = { name: info.name, both: now.both };
  while (whole(from) !== whole(now.both) && info === state.info) {
    $("index-accuracy").textContent = `${percent(from)} accurate on the examples`;
    await pause(STEP);
    from += Math.sign(now.both - from) / 100;
  }
  if (info === state.info) $("index-accuracy").textContent = `${percent(now.both)} accurate on the examples (${now.interval.map(whole).join("–")})`;
}
for (const event of ["index", "version"]) state.addEventListener(event, show);

/** Return a sentence about the effect of a change on the accuracy, or "" if one of the two accuracies is unknown. */
export async function gained(before) {
  const [old, now] = await Promise.all([before, state.accuracy()]);
  if (!known(old) || !known(now) || now.version <= old.version) return "";
  const [from, to] = [percent(old.both), percent(now.both)];
  return ` The accuracy on the examples ${from === to ? "is still" : `changed from ${from} to`} ${to}.`;
}
