// How often an index is right on its own photographs, each held out: as it was fitted, and as its photographs are now.

import { state } from "./state.js";

const percent = (share) => `${Math.round(100 * share)} %`;
const known = (accuracy) => typeof accuracy?.photos === "number";

/** An accuracy in words; "" where none is known. */
export function judged(accuracy) {
  if (!known(accuracy)) return "";
  const { photos, words, both } = accuracy;
  if (words === null) return `Judged on its own photographs, each left out: ${percent(photos)} right.`;
  return (
    `Judged on its own photographs, each left out: photos alone ${percent(photos)}, ` +
    `words alone ${percent(words)}, both ${percent(both)} right.`
  );
}

/** The accuracy of the version that is shown; null where the server does not know it. */
export const estimated = () => state.accuracy().catch(() => null);

/** Say in an element how well the index was judged. What is said stays until the server knows better. */
export async function showAccuracy(element) {
  const { info } = state;
  const { fit } = info.provenance;
  if (element.dataset.index !== info.name) element.textContent = judged(fit);
  element.dataset.index = info.name;
  const now = await estimated();
  if (info === state.info) element.textContent = judged(known(now) ? now : fit);
}

/** What a change did to the accuracy, once it is known before and after; "" where it is not. */
export async function gained(before) {
  const [old, now] = await Promise.all([before, estimated()]);
  if (!known(old) || !known(now) || now.version <= old.version) return "";
  const [from, to] = [percent(old.both), percent(now.both)];
  return from === to ? ` Accuracy stays at ${to}.` : ` Accuracy ${from} → ${to}.`;
}
