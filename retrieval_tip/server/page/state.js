// The index on the page, and its changes. An "index" event is fired when another index is opened, and a "version" event
// when the index has a new version.

import * as api from "./api.js";
import { ask } from "./dialogs.js";
import { $, el } from "./dom.js";

const BATCH = 16; // number of photos per request

// The printed address ends with #token=... Keep the token for this tab, and remove it from the
// address bar.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem(api.TOKEN, given);
  history.replaceState(null, "", location.pathname);
}

class State extends EventTarget {
  info = null; // GET /v1/indexes/{name}
  labels = []; // by class id
  mayChange = false; // whether the server accepts changes
  #exemplars = null;
  #accuracy = null;

  async open(name) {
    this.#take(await api.index(name));
    this.dispatchEvent(new Event("index"));
  }

  /** Fetch the index again, and fire "version" if it has changed. */
  async refresh() {
    const { name, version } = this.info;
    const info = await api.index(name);
    if (this.info.name !== name || info.version === this.info.version || info.version === version) return;
    this.#take(info);
    this.dispatchEvent(new Event("version"));
  }

  #take(info) {
    this.info = info;
    this.labels = [];
    this.#exemplars = this.#accuracy = null;
    for (const { class_id: id, label } of info.classes) this.labels[id] = label;
    $("class-names").replaceChildren(...info.classes.map(({ label }) => el("option", { value: label })));
  }

  /** Return a typical shot of each class, and mean affinities. They are fetched once per version. */
  exemplars = () => (this.#exemplars ??= api.exemplars(this.info.name));

  /** Return the estimated accuracy. It is fetched once per version. */
  accuracy = () => (this.#accuracy ??= api.accuracy(this.info.name));

  /** Add photos as examples of a class, in batches. Return the merged answers of the server, or null if there is no
   *  token. */
  async add(label, files, progress = () => {}) {
    const lists = { key_ids: [], classes: [], duplicates: [], warnings: [], skipped: [] };
    const all = { ...lists, known: 0, since: this.info.version };
    for (let at = 0; at < files.length; at += BATCH) {
      const part = files.slice(at, at + BATCH);
      const added = await this.#change(() => api.addShots(this.info.name, label, part), false);
      if (!added) return null;
      for (const name of Object.keys(lists)) all[name].push(...added[name]);
      all.known += added.known;
      all.version = added.version;
      progress(Math.min(files.length, at + BATCH));
    }
    await this.refresh();
    return all;
  }

  /** Create an index from [label, file] pairs, and open it. */
  async make(name, pairs) {
    const like = this.info?.images ? this.info.name : undefined;
    return this.#opened(() => api.makeIndex(name, like, pairs));
  }

  renameIndex = (name) => this.#opened(() => api.renameIndex(this.info.name, name));
  duplicateIndex = (name) => this.#opened(() => api.duplicateIndex(this.info.name, name));
  deleteIndex = () => this.#opened(() => api.deleteIndex(this.info.name));

  /** Change the list of indexes, and open the changed index, or another one if it was deleted. */
  async #opened(send) {
    const changed = await this.#change(send, false);
    if (changed) {
      const detail = { name: changed.index };
      this.dispatchEvent(new CustomEvent("made", { detail }));
      await detail.done;
    }
    return changed;
  }

  /** Fit the index to its shots again. */
  fit = () => this.#change(() => api.fit(this.info.name));
  remove = (keyIds) => this.#change(() => api.removeShots(this.info.name, keyIds));
  relabel = (keyIds, label) => this.#change(() => api.relabel(this.info.name, { key_ids: keyIds, label }));
  /** Relabel several groups of shots, given as [{ key_ids, label }], in one new version. */
  relabelAll = (moves) => this.#change(() => api.relabel(this.info.name, { moves }));
  /** Rename a class. If another class already has the new name, the two classes are merged. */
  rename = (of, label) => this.#change(() => api.rename(this.info.name, { of, label }));
  /** Restore version `to`, provided that the index is still at version `since`. */
  rollback = (to, since) => this.#change(() => api.rollback(this.info.name, { to, since }));

  /** Label photos in the labelling session, and return its new state. */
  setLabels = (change) => this.#change(() => api.setLabels(change), false);

  /** Copy the photos of the labelling session into folders by class. */
  sortPhotos = (into) => this.#change(() => api.sortPhotos(into), false);

  /** Send a change with the token. If the token is unknown, ask the user for it, and return null if there is none. */
  async #change(send, refresh = true) {
    for (let wrong = false; ; wrong = true) {
      const known = !wrong && sessionStorage.getItem(api.TOKEN);
      if (!known && !(await askToken())) return null;
      try {
        const changed = await send();
        if (refresh) await this.refresh();
        return changed;
      } catch (error) {
        if (error.status !== 401) throw error;
      }
    }
  }
}

/** Ask for the token, and keep it for this tab. A token that is already known was refused. Return whether one is given. */
export async function askToken() {
  $("token").value = "";
  $("token-refused").hidden = !sessionStorage.getItem(api.TOKEN);
  sessionStorage.removeItem(api.TOKEN);
  if ((await ask($("token-dialog"))) !== "ok") return false;
  sessionStorage.setItem(api.TOKEN, $("token").value);
  return true;
}

$("token-cancel").addEventListener("click", () => $("token-dialog").close(""));

export const state = new State();
