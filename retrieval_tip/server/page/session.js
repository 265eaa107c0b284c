// The labelling session. Its state comes from the server, which chooses the photos and saves the labels. Changes are
// sent in the background, so that the next photo appears at once. A "state" event is fired after every change.

import * as api from "./api.js";
import { plural } from "./dom.js";
import { NONE } from "./names.js";
import { notice } from "./dialogs.js";
import { state } from "./state.js";

const AGAIN = 1000; // ms between two requests for the state, or between two attempts to send changes
const MOST = 1000; // number of labels per change

const unique = () => [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(36)).join("-");

class Session extends EventTarget {
  now = null; // GET /v1/label, with the changes that are not sent yet, or null if there is no session
  rejected = null; // why the server did not accept the last change
  #outbox = []; // changes that are not sent yet: a step, or the name of a step to undo
  #made = new Map(); // the steps of this page by name, as { step, photos, labels, entry }; `entry` was in the queue
  #answered = 0; // number of changes that the server has answered
  #polling = null;
  #opening = false; // whether the new index is being opened
  #sending = false;
  #warned = false; // whether a notice says that changes are waiting

  /** Fetch the state. It is outdated if the server has answered a change in the meantime. */
  async fetch() {
    const before = this.#answered;
    const answer = await api.request("/v1/label");
    if (before === this.#answered) this.#take(answer);
    else this.#later();
  }

  #later() {
    clearTimeout(this.#polling);
    this.#polling = setTimeout(() => this.follow(), AGAIN);
  }

  async follow() {
    try {
      await this.fetch();
    } catch (error) {
      if (api.passing(error)) this.#later();
    }
  }

  #take(answer) {
    this.now = answer;
    answer.others = answer.others.replaceAll(",", "\u202f"); // the server does not write numbers as the page does
    for (const change of this.#outbox) this.#apply(change);
    if (answer.version && !state.info && !this.#opening) {
      this.#opening = true;
      state.reopen(answer.index);
    }
    const known = state.info?.name === answer.index ? state.info.version : answer.version;
    if (known < answer.version) state.refresh().catch(() => {}); // the next answer tries again
    clearTimeout(this.#polling);
    if (answer.busy || answer.encoded < answer.photos) this.#later();
    this.dispatchEvent(new Event("state"));
  }

  /** The steps that can be undone, as { step, photos, labels }. If photos were skipped, there are no labels. */
  get steps() {
    const done = new Map(this.now.steps.map((one) => [one.step, one]));
    for (const { step, undo } of this.#outbox) {
      if (step) done.set(step, this.#made.get(step));
      else done.delete(undo);
    }
    return [...done.values()];
  }

  /** The number of labelled photos, and the number of changes that are not sent yet. */
  get labelled() {
    return this.now.labelled + this.#outbox.reduce((sum, change) => sum + this.#added(change), 0);
  }

  get waiting() {
    return this.#outbox.length;
  }

  /** Whether only the server knows which photo to show next, because a step from before a reload is being undone. */
  get undoing() {
    return this.#outbox.some(({ undo }) => undo && !this.#made.has(undo));
  }

  #added({ labels = [], undo }) {
    const given = (some) => some.filter((label) => label !== null).length;
    return given(labels.map(({ label }) => label)) - given(this.#made.get(undo)?.labels ?? []);
  }

  putFirst(entry) {
    this.now.queue = [entry, ...this.now.queue.filter(({ photo }) => photo !== entry.photo)];
  }

  /** Give photos labels as [photo, label] pairs, or remove labels that are null. Return the names of the steps, one per
   *  thousand photos. `entry` is the queue entry that returns if the step is undone. Without it, they were reviewed. */
  label(pairs, entry = null) {
    const labels = pairs.map(([photo, label]) => ({ photo, label }));
    const parts = Array.from({ length: Math.ceil(labels.length / MOST) }, (_, i) => labels.slice(i * MOST, (i + 1) * MOST));
    return parts.map((part) => {
      const made = { photos: part.map(({ photo }) => photo), labels: part.map(({ label }) => label), entry };
      return this.#step(made, { labels: part, reviewed: entry === null });
    });
  }

  skip(entry) {
    return this.#step({ photos: [entry.photo], labels: [], entry }, { skip: [entry.photo] });
  }

  undo(name) {
    this.#put({ undo: name });
  }

  #step(made, change) {
    const step = unique();
    this.#made.set(step, { step, ...made });
    this.#put({ step, ...change });
    return step;
  }

  #put(change) {
    this.rejected = null;
    this.#outbox.push(change);
    this.#apply(change);
    this.dispatchEvent(new Event("state"));
    this.#send();
  }

  /** Make a change in the queue and in the list of classes. */
  #apply({ step, undo }) {
    const { entry, photos, labels } = this.#made.get(step ?? undo) ?? {};
    if (undo && entry) this.putFirst(entry);
    if (undo) return;
    const { now } = this;
    now.queue = now.queue.filter(({ photo }) => !photos.includes(photo));
    for (const one of now.queue) one.similar = one.similar.filter((photo) => !photos.includes(photo));
    for (const label of labels) if (label && label !== NONE) now.classes[label] ??= 0;
  }

  /** Send all changes in order. While the server cannot be reached or cannot store them, try again. */
  async #send() {
    if (this.#sending) return;
    this.#sending = true;
    while (this.#outbox.length) {
      let answer;
      try {
        answer = await state.setLabels(this.#outbox[0]);
        if (answer === null) break; // no token
        if (this.#warned) notice("");
        this.#warned = false;
      } catch (error) {
        if (api.passing(error) || error.status >= 500) {
          this.#warned = true;
          notice(`${error.message} ${plural(this.#outbox.length, "change is", "changes are")} waiting. Trying again…`);
          await api.pause(AGAIN);
          continue;
        }
        this.rejected = error;
      }
      this.#outbox.shift();
      this.#answered++;
      if (answer) this.#take(answer);
      else await this.follow();
    }
    this.#sending = false;
  }
}

export const session = new Session();
addEventListener("beforeunload", (event) => session.waiting && event.preventDefault());
