// A photo on the page, with its file, the server's evidence, and the answer for the current settings.

import * as api from "./api.js";
import { cacheOf, classify, computable, contributors, evidenceOf } from "./method.js";
import { settings } from "./settings.js";
import { state } from "./state.js";

export const TOP = 8; // number of classes in an answer
export const NEIGHBOURS = 8; // number of shots whose sources the server sends
const SAME = 0.9995; // minimum affinity of a photo to itself

export class Photo {
  static #count = 0;

  evidence = null;
  version = null; // index version to which the evidence belongs
  served = null; // the server's answer as { name, rows, unlike, supporting, opposing }; `name` identifies the settings
  shown = null; // { rows, how, unlike }
  before = null; // the answer before the index changed
  named = new Map(); // the shots behind the answer, by key id
  without = new Set(); // key ids of this photo itself
  problem = null; // the reason why there is no answer
  busy = false;
  taught = null; // the class that the photo was added to

  /** If the file is the image of a shot, `keyId` is the key id of that shot. */
  constructor(file, keyId = null) {
    this.id = `photo-${++Photo.#count}`;
    this.file = file;
    this.keyId = keyId;
    this.gone = new AbortController();
  }

  get name() {
    return this.file.name;
  }

  get winner() {
    return this.shown?.rows[0] ?? null;
  }

  get unlike() {
    return this.shown?.unlike === true;
  }

  /** A sort key, which is highest for photos that have no answer, and then for photos that have no match. */
  get doubt() {
    if (!this.shown) return 3;
    return (this.unlike ? 1 : 0) + 1 - this.winner.probability;
  }

  /** Discard the answer, because another index is open. */
  forget() {
    Object.assign(this, { evidence: null, served: null, shown: null, before: null, problem: null, taught: null });
    if (state.info) this.without = new Set();
  }

  /** Send the photo to the server. Throws api.Problem, or AbortError if the photo was removed. */
  async ask(left, waiting) {
    const signal = AbortSignal.any([this.gone.signal, left]);
    const { name } = settings;
    const asked = { index: state.info.name, ...parameters(), evidence: true };
    const answer = await api.classifyFile(this.file, asked, { signal, waiting });
    if (!answer.results.length) throw new api.Problem(answer.skipped[0].reason, 422);
    return this.take(answer, answer.results[0], name);
  }

  /** Store the server's answer for the settings with this name. Return false if the index has changed meanwhile. */
  async take(answer, result, name) {
    if (answer.version !== state.info.version) await state.refresh();
    if (result.evidence) {
      this.evidence = evidenceOf(result.evidence);
      this.version = answer.version;
    }
    if (answer.version !== state.info.version) return false;
    if (result.evidence) {
      const shots = [...result.neighbours, ...(result.opposing ? [result.opposing] : [])];
      this.named = new Map(shots.map((key) => [key.key_id, key]));
      const { keyIds, affinities } = this.evidence;
      const itself = keyIds.filter((id, i) => id === this.keyId || affinities[i] >= SAME);
      this.without = new Set(itself.length < affinities.length ? itself : []);
    }
    this.served = {
      name,
      rows: rowsOf(result, this.evidence.text),
      unlike: result.unlike ?? false,
      supporting: result.neighbours.map(shotOf),
      opposing: result.opposing && shotOf(result.opposing),
    };
    this.busy = false;
    this.problem = null;
    this.weigh();
    return true;
  }

  get exact() {
    return this.evidence !== null && computable(state.model, this.evidence, settings);
  }

  get current() {
    return this.evidence !== null && this.version === state.info.version;
  }

  /** Whether the photo is one of the shots, and is therefore classified with the other shots. */
  get judgedByOthers() {
    return this.exact && this.without.size > 0;
  }

  /** Compute the answer for the current settings. */
  weigh() {
    if (!this.current) return;
    if (this.exact || this.served?.name !== settings.name) {
      const rows = classify(this.evidence, settings, state.model, TOP, this.without);
      for (const row of rows) row.label = state.labels[row.classId];
      this.shown = { rows, how: this.exact ? "page" : "estimate", unlike: this.#unlike() };
    } else {
      this.shown = { rows: this.served.rows, how: "server", unlike: this.served.unlike };
    }
  }

  /** Return whether the photo is unlike all shots, given the settings of the index and not the sliders. */
  #unlike() {
    const least = state.info.least_cache;
    if (least === null || !this.without.size) return this.served?.unlike ?? false;
    const { alpha, beta, k, tail } = state.info;
    const cache = cacheOf(this.evidence, { alpha, beta, k, tail }, state.model, this.without);
    return Math.max(...cache.filter((_, c) => this.evidence.counts[c])) < least;
  }

  /** Return the shots behind the answer as { supporting, opposing }, where each shot is an object { keyId, label, source,
   *  affinity, contribution }. */
  contributors(number) {
    if (this.shown.how === "server") {
      const { supporting, opposing } = this.served;
      return { supporting: supporting.slice(0, number), opposing };
    }
    const [winner, rival] = this.shown.rows.map(({ classId }) => classId);
    const without = this.exact ? this.without : undefined;
    const found = contributors(this.evidence, settings, state.model, { winner, rival, number }, without);
    const named = (key) => ({
      ...key,
      label: state.labels[key.classId],
      source: this.named.get(key.keyId)?.source ?? `example ${key.keyId}`,
    });
    return { supporting: found.supporting.map(named), opposing: found.opposing && named(found.opposing) };
  }

  /** Up to three other classes to suggest. */
  get choices() {
    if (!this.shown) return [];
    const { rows } = this.shown;
    return (this.unlike ? rows : rows.slice(1)).slice(0, 3).map(({ label }) => label);
  }
}

/** Return the parameters of a classification request. */
export const parameters = () => ({ ...settings.values, top: TOP, neighbours: NEIGHBOURS, logits: true });

/** Convert a shot in the server's answer. */
function shotOf({ key_id: keyId, label, source, affinity, weight, gives }) {
  return { keyId, label, source, affinity, weight, contribution: gives[0] };
}

/** Convert the server's answer to rows. The cache part of a logit is the logit minus its text part. */
function rowsOf({ labels, probabilities, logits, text_logit: text, cache_logit, discriminant_logit }, texts) {
  const cache = cache_logit + (discriminant_logit ?? 0);
  return labels.map((label, i) => {
    const classId = state.labels.indexOf(label);
    const parts = i === 0 ? { text, cache } : { text: texts[classId], cache: (logits?.[classId] ?? NaN) - texts[classId] };
    return { classId, label, probability: probabilities[i], ...parts };
  });
}
