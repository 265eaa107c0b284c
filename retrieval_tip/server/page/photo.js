// A photo on the page, with its file, its feature, and the answer of the server.

import * as api from "./api.js";
import { el, nameOf, picture, preview } from "./dom.js";
import { state } from "./state.js";

const TOP = 8; // number of classes in an answer
const NEIGHBOURS = 5; // number of supporting examples in an answer
const SURE = 0.9; // minimum probability of an answer, if the classes have groups
const SAME = 0.9995; // minimum affinity of a photo to itself

export class Photo {
  static #count = 0;
  inFolder = false; // whether it belongs to the labelling session

  feature = null;
  similar = []; // the most similar examples as [{ key_id, affinity }], most similar first
  without = []; // key ids of this photo itself, which is classified with the other examples
  version = null; // index version to which these belong
  shown = null; // the answer as { rows, no_match, group, supporting, opposing }
  picture = null; // of a video, which has no feature: the frame that matches best
  problem = null; // the reason why there is no answer
  busy = false;
  taught = null; // the class that the photo was added to
  visit = null; // the number of its visit, and
  together = 1; // the number of photos of this visit
  rank = -1; // the place, and
  kind = ""; // the class, when the photos were sorted
  seen = null; // the class on a screen that a person has confirmed, if the photo got no label there

  /** If the file is the image of a shot, its `keyId` is the key id of that shot. */
  constructor(file) {
    this.id = `photo-${++Photo.#count}`;
    this.file = file;
    this.name = file.name;
    this.gone = new AbortController();
  }

  /** Return an image of the photo, for a place of this size in pixels. */
  image(size, alt) {
    return this.picture ? el("img", { alt, src: this.picture }) : preview(this.file, alt);
  }

  /** Return the file of the photo. */
  async original() {
    return this.file;
  }

  get winner() {
    return this.shown?.rows[0] ?? null;
  }

  /** The narrowest group of classes that is sure, as { label, level, probability }, if no class is. */
  get group() {
    return this.shown?.group ?? null;
  }

  get no_match() {
    return this.shown?.no_match === true;
  }

  /** Whether it says "No match" instead of its best class. In a session, a person reviews the best class. */
  get unanswered() {
    return this.no_match && !this.inFolder;
  }

  /** A sort key, which is highest for photos that have no answer, and then for photos that have no match. */
  get doubt() {
    if (!this.shown) return 3;
    return (this.no_match ? 1 : 0) + 1 - this.winner.probability;
  }

  /** Discard the answer, because another index is open. */
  forget() {
    Object.assign(this, { feature: null, similar: [], without: [], shown: null, problem: null, taught: null });
  }

  /** Store an answer that was given without some keys. Return false if the index has changed, or has the photo. */
  take({ version }, result, without) {
    const { feature, similar } = result;
    if (feature) {
      const itself = similar.filter(({ key_id: id, affinity }) => id === this.file.keyId || affinity >= SAME).map(({ key_id: id }) => id);
      Object.assign(this, { feature: Float32Array.from(feature), similar, version });
      this.without = itself.length < state.info.n ? itself : [];
    }
    if (version !== state.info.version || String(this.without) !== String(without)) return false;
    this.shown = answerOf(result);
    this.picture = result.picture ?? null;
    this.busy = false;
    this.problem = null;
    return true;
  }

  get current() {
    return this.feature !== null && this.version === state.info.version;
  }

  /** Whether the photo is one of the shots, and is therefore classified with the other shots. */
  get judgedByOthers() {
    return this.without.length > 0;
  }

  /** The best other classes. */
  get choices() {
    if (!this.shown) return [];
    const { rows } = this.shown;
    const others = rows.map(({ label }) => label).filter((label) => this.unanswered || label !== this.winner.label);
    return others.slice(0, 3);
  }
}

/** A photo of the labelling session. The server has its file and its feature, and it can get another label. */
export class FolderPhoto extends Photo {
  best = null; // the answer of the session, to which similar photos contribute
  given = []; // what the photo itself and similar photos give to this answer, as [{ input, label, gives }]
  rank = Infinity; // after the photos that were sorted before

  constructor({ photo, name }) {
    super({ name: nameOf(name) });
    Object.assign(this, { inFolder: true, number: photo, path: name });
  }

  image(size, alt) {
    return picture(api.labelPhoto(this.number), size, alt);
  }

  async original() {
    const response = await api.bytes(api.labelPhoto(this.number, "file"));
    return new File([await response.blob()], this.name);
  }

  get winner() {
    return (this.shown && this.best) || super.winner;
  }

  /** Take the label that the session has for the photo. Its answer is only shown by `renew`. */
  tell(newest) {
    Object.assign(this, { taught: newest.label, visit: newest.visit, newest });
  }

  /** Show the newest answer of the session. The evidence for the answer before it is fetched again when it is needed. */
  renew() {
    const { guesses, no_match } = this.newest;
    if (!guesses.length) return; // it has a label
    const rows = guesses.map((guess) => ({ ...guess, text: NaN, cache: NaN }));
    const shown = { no_match, rows, supporting: [], opposing: null };
    Object.assign(this, { best: guesses[0], given: [], version: null, shown });
  }

  /** Store the evidence. The session decides about the answer, and whether it has no match. */
  take(answer, result, without) {
    return super.take(answer, { ...result, no_match: this.no_match, level: null }, without);
  }

  /** Fetch what similar photos give, and the feature, with which the photo is classified like any other photo. */
  async fetch() {
    this.given = await api.request(api.labelPhoto(this.number, "similar"));
    const response = await api.bytes(api.labelPhoto(this.number, "feature"));
    this.feature = new Float32Array(await response.arrayBuffer());
  }
}

/** Return the parameters of a classification request. */
export const parameters = () => {
  const least = state.info.levels.length ? SURE : undefined;
  return { index: state.info.name, top: TOP, neighbours: NEIGHBOURS, at_least: least };
};

/** Return the server's answer to a photo, as the page uses it. */
function answerOf(result) {
  const { no_match = false, neighbours: supporting, opposing, level } = result;
  const group = level && level !== state.info.levels[0] && !no_match ? result : null; // no class is sure
  const { labels, probabilities, text_logits: texts, shot_logits: shots } = result;
  const rows = labels.map((label, i) => ({ label, probability: probabilities[i], text: texts[i], cache: shots[i] }));
  return { no_match, rows, group, supporting, opposing };
}
