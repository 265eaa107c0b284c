// The method, once: Tip-Adapter over the evidence of one image, in float64. Pure functions; as tip.py does in torch.
//
//   affinities A are to the keys in the index's metric, where it has one: the server gives them
//   cache   C_c = sum over the k nearest keys i of class c of exp(-beta (1 - A_i))
//           + with tail, for the r_c keys of c that are left:  r_c exp(-beta (1 - m_c)),  m_c their mean affinity
//   logits  = text + alpha C          probabilities = softmax(logits / temperature)
//
// Settings are { alpha, beta, k, tail }, k a number or "all".

/** Evidence as the server sends it, its long lists as typed arrays. */
export function evidenceOf(json) {
  return {
    feature: json.feature,
    text: Float64Array.from(json.text),
    keyIds: json.key_ids,
    classIds: Int32Array.from(json.class_ids),
    affinities: Float64Array.from(json.affinities),
    counts: Float64Array.from(json.counts),
    sums: Float64Array.from(json.sums),
    complete: json.complete,
  };
}

/** Whether the answer is exactly the server's: all keys that count are here, and they are really the nearest. */
export function computable(index, evidence, { k }) {
  if (index.values !== "one-hot") return false;
  if (k === "all") return evidence.complete;
  return index.exact_search && (k <= evidence.affinities.length || evidence.complete);
}

/** What one key adds to its class: exp(-beta (1 - A)). */
export function weight(affinity, beta) {
  return Math.exp(-beta * (1 - affinity));
}

/** The cache C, one number a class, without alpha. Of keys that are not here only the counts and sums are known. */
export function cacheOf({ classIds, affinities, counts, sums, complete }, { beta, k, tail }) {
  const all = k === "all";
  const number = all ? affinities.length : Math.min(k, affinities.length);
  const cache = new Float64Array(counts.length);
  const left = Float64Array.from(counts);
  const rest = Float64Array.from(sums);
  for (let i = 0; i < number; i++) {
    const c = classIds[i];
    cache[c] += weight(affinities[i], beta);
    left[c] -= 1;
    rest[c] -= affinities[i];
  }
  if (all ? !complete : tail) {
    for (let c = 0; c < cache.length; c++) if (left[c] > 0) cache[c] += left[c] * weight(rest[c] / left[c], beta);
  }
  return cache;
}

/** Softmax of logits / temperature; the winner's logit is subtracted first, so that it is finite. */
export function softmax(logits, temperature) {
  let most = -Infinity;
  for (const logit of logits) most = Math.max(most, logit);
  const probabilities = Float64Array.from(logits, (logit) => Math.exp((logit - most) / temperature));
  let sum = 0;
  for (const p of probabilities) sum += p;
  return probabilities.map((p) => p / sum);
}

/** The places of the largest numbers, largest first; of equal ones the first. */
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

/** The top classes: [{ classId, probability, text, cache }], cache with alpha, so that text + cache is the logit. */
export function classify(evidence, settings, temperature, top) {
  const cache = cacheOf(evidence, settings).map((value) => settings.alpha * value);
  const logits = evidence.text.map((value, c) => value + cache[c]);
  const probabilities = softmax(logits, temperature);
  return largest(logits, top).map((c) => ({
    classId: c,
    probability: probabilities[c],
    text: evidence.text[c],
    cache: cache[c],
  }));
}
