// The accuracy of a classifier, estimated on its own example photos: at its last fit, and as the examples are now.

import { state } from "./state.js";

const percent = (share) => `${Math.round(100 * share)} %`;
const known = (accuracy) => typeof accuracy?.photos === "number";

/** A sentence about an accuracy; "" if it is unknown. */
export function judged(accuracy) {
  if (!known(accuracy)) return "";
  const { photos, words, both } = accuracy;
  const parts = words === null ? "" : ` Photos alone: ${percent(photos)}; class names alone: ${percent(words)}.`;
  return `Estimated accuracy: ${percent(both ?? photos)} (tested on its own examples, each hidden in turn).${parts}`;
}

/** The accuracy of the current version; null if the server cannot tell. */
export const estimated = () => state.accuracy().catch(() => null);

/** Show the accuracy in an element. The last known one stays until the server knows a newer one. */
export async function showAccuracy(element) {
  const { info } = state;
  const { fit } = info.provenance;
  if (element.dataset.index !== info.name) element.textContent = judged(fit);
  element.dataset.index = info.name;
  const now = await estimated();
  if (info === state.info) element.textContent = judged(known(now) ? now : fit);
}

/** A sentence about how a change affected the accuracy; "" if it is unknown before or after. */
export async function gained(before) {
  const [old, now] = await Promise.all([before, estimated()]);
  if (!known(old) || !known(now) || now.version <= old.version) return "";
  const [from, to] = [percent(old.both), percent(now.both)];
  return from === to ? ` Accuracy stays at ${to}.` : ` Accuracy ${from} → ${to}.`;
}
