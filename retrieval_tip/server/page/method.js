// Tip-Adapter for the evidence of one image. These pure functions compute the same in float64 as tip.py does in torch.
//
//   A       affinities to the keys, which the server computes (with the metric of the index, if it has one)
//   cache   C_c = sum of exp(-beta (1 - A_i)) over the k nearest keys i of class c
//           with tail, plus r_c exp(-beta (1 - m_c)) for the other r_c keys of c, whose mean affinity is m_c
//   with solved or trained values V_i:
//           C = sum of exp(-beta (1 - A_i)) V_i;  with tail, each other key has the mean affinity of its class
//           with an offset o, C is then replaced by log(1 + max(C, 0) / o)
//   B       the mean affinity to the keys of each class, plus an offset, which the server computes
//   logits  = text + alpha (C + gamma B)          probabilities = softmax(logits / temperature)
//
// Settings are { alpha, beta, k, tail }, where k is a number or "all". A model is an object { values, offset, gamma,
// temperature, exact }, where `values` is a Map from key ids to Float64Arrays, or null if values are one-hot. `without`
// is a set of key ids to ignore. If a photo is one of the shots, it is used to classify the photo with the other shots.

const NONE = new Set();

/** Convert the lists in the server's evidence to typed arrays. */
export function evidenceOf(json) {
  return {
    feature: Float32Array.from(json.feature),
    text: Float64Array.from(json.text),
    keyIds: json.key_ids,
    classIds: Int32Array.from(json.class_ids),
    affinities: Float64Array.from(json.affinities),
    counts: Float64Array.from(json.counts),
    sums: Float64Array.from(json.sums),
    discriminant: Float64Array.from(json.discriminant),
    complete: json.complete,
  };
}

/** Return whether `classify` gives exactly the server's answer, because the evidence contains all keys that count. */
export function computable(model, evidence, { k }) {
  if (model.values === undefined) return false;
  if (model.values !== null && !evidence.complete) return false;
  if (k === "all") return evidence.complete;
  return model.exact && (k <= evidence.affinities.length || evidence.complete);
}

/** Return the weight of a key, exp(-beta (1 - A)). */
export function weight(affinity, beta) {
  return Math.exp(-beta * (1 - affinity));
}

/** Return the cache C, with one number per class, before it is multiplied by alpha. For keys that are not part of the
 *  evidence, their number and the sum of their affinities in each class are used. */
export function cacheOf(evidence, { beta, k, tail }, { values, offset } = {}, without = NONE) {
  const { keyIds, classIds, affinities, counts, sums, complete } = evidence;
  const all = k === "all";
  const most = all ? Infinity : k;
  const cache = new Float64Array(counts.length);
  const left = Float64Array.from(counts);
  const rest = Float64Array.from(sums);
  const give = (id, c, w) => {
    const row = values?.get(id);
    if (!row) cache[c] += values ? 0 : w;
    else for (let j = 0; j < cache.length; j++) cache[j] += w * row[j];
  };
  let met = 0;
  const beyond = [];
  for (let i = 0; i < affinities.length; i++) {
    const c = classIds[i];
    const out = without.size > 0 && without.has(keyIds[i]);
    if (!out && met >= most) {
      if (!values) break; // if values are one-hot, counts and sums cover the remaining keys
      beyond.push(i);
      continue;
    }
    left[c] -= 1;
    rest[c] -= affinities[i];
    if (out) continue;
    met++;
    give(keyIds[i], c, weight(affinities[i], beta));
  }
  const mean = (c) => weight(rest[c] / left[c], beta);
  if (values) {
    if (tail && !all) for (const i of beyond) give(keyIds[i], classIds[i], mean(classIds[i]));
  } else if (all ? !complete : tail) {
    for (let c = 0; c < cache.length; c++) if (left[c] > 0.5) cache[c] += left[c] * mean(c);
  }
  return offset ? cache.map((value) => Math.log1p(Math.max(value, 0) / offset)) : cache;
}

/** Return the discriminant B, with one number per class. Keys in `without` do not count towards the mean affinity. */
export function discriminantOf({ keyIds, classIds, affinities, counts, sums, discriminant }, without = NONE) {
  const left = Float64Array.from(counts);
  const rest = Float64Array.from(sums);
  for (let i = 0; i < affinities.length && without.size > 0; i++) {
    if (!without.has(keyIds[i])) continue;
    left[classIds[i]] -= 1;
    rest[classIds[i]] -= affinities[i];
  }
  return discriminant.map((value, c) => (left[c] > 0.5 ? value + rest[c] / left[c] - sums[c] / counts[c] : value));
}

/** Return the keys behind an answer as { supporting, opposing }, in the same way as retrieval/evidence.py. Each key is
 *  { keyId, classId, affinity, weight, contribution }. `winner` and `rival` are class ids, and `rival` can be
 *  undefined. */
export function contributors(evidence, { beta, k }, { values }, { winner, rival, number }, without = NONE) {
  const { keyIds, classIds, affinities } = evidence;
  const met = [];
  for (let i = 0; i < affinities.length && met.length < (k === "all" ? Infinity : k); i++) {
    if (without.has(keyIds[i])) continue;
    const w = weight(affinities[i], beta);
    const gives = (c) => (values ? w * (values.get(keyIds[i])?.[c] ?? 0) : classIds[i] === c ? w : 0);
    const key = { keyId: keyIds[i], classId: classIds[i], affinity: affinities[i], weight: w };
    met.push({ ...key, contribution: gives(winner), toRival: rival === undefined ? 0 : gives(rival) });
  }
  const first = (by) => met.reduce((best, key) => (best === null || by(key) > by(best) ? key : best), null);
  const lowest = first((key) => -key.contribution);
  const other = first((key) => key.toRival);
  const opposing = lowest?.contribution < 0 ? lowest : other?.toRival > 0 ? other : null;
  const supporting = met.toSorted((a, b) => b.contribution - a.contribution).slice(0, number);
  return { supporting, opposing };
}

/** Return the softmax of logits / temperature. The largest logit is subtracted first, so that the result is finite. */
export function softmax(logits, temperature) {
  let most = -Infinity;
  for (const logit of logits) most = Math.max(most, logit);
  const probabilities = Float64Array.from(logits, (logit) => Math.exp((logit - most) / temperature));
  let sum = 0;
  for (const p of probabilities) sum += p;
  return probabilities.map((p) => p / sum);
}

/** Return the indices of the `number` largest values, in descending order. */
export function largest(values, number) {
  const found = [];
  for (let i = 0; i < values.length; i++) {
    if (found.length === number && !(values[i] > values[found[number - 1]])) continue;
    let at = found.length;
    while (at > 0 && values[i] > values[found[at - 1]]) at--;
    found.splice(at, 0, i);
    if (found.length > number) found.pop();
  }
  return found;
}

/** Return the top classes as [{ classId, probability, text, cache }]. `cache` is alpha (C + gamma B), so that the logit is
 *  text + cache. */
export function classify(evidence, settings, model, top, without) {
  const averages = model.gamma ? discriminantOf(evidence, without) : null;
  const cache = cacheOf(evidence, settings, model, without).map(
    (value, c) => settings.alpha * (averages ? value + model.gamma * averages[c] : value),
  );
  const { temperature } = model;
  const logits = evidence.text.map((value, c) => value + cache[c]);
  const probabilities = softmax(logits, temperature);
  return largest(logits, top).map((c) => ({
    classId: c,
    probability: probabilities[c],
    text: evidence.text[c],
    cache: cache[c],
  }));
}
