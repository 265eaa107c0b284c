// The index on the page, and its changes. Another index fires an "index" event, and a new version a "version" event.

import * as api from "./api.js";
import { agreed } from "./dialogs.js";
import { $, el } from "./dom.js";

const BATCH = 16; // number of photos per request

// The printed address ends with #token=... Keep the token for this tab, and remove it from the address bar.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem(api.TOKEN, given);
  history.replaceState(null, "", location.pathname);
}

class State extends EventTarget {
  info = null; // GET /v1/indexes/{name}
  labels = []; // by class id
  mayChange = false; // whether the server accepts changes
  reopen = null; // lists the indexes again, and opens the one that has a name
  #exemplars = null;
  #accuracy = null;

  async open(name) {
    this.#take(await api.request(api.at(name)));
    this.dispatchEvent(new Event("index"));
  }

  /** Fetch the index again, and fire "version" if it has changed. */
  async refresh() {
    const { name, version } = this.info;
    const info = await this.get();
    if (this.info.name !== name || info.version === this.info.version || info.version === version) return;
    this.#take(info);
    this.dispatchEvent(new Event("version"));
  }

  /** Fetch the description of the index, or something in it. */
  get = (what = "", parameters = {}, options = {}) => api.request(`${this.#at(what)}${api.query(parameters)}`, options);

  #take(info) {
    this.info = info;
    this.labels = info.class_names;
    this.#exemplars = this.#accuracy = null;
    $("class-names").replaceChildren(...this.labels.map((value) => el("option", { value })));
  }

  /** Return typical shots of the classes, which are fetched once per version. If this fails, there are none. */
  exemplars = () => (this.#exemplars ??= this.get("/exemplars").catch(() => []));

  /** Return whether the server has images of the shots. */
  pictured = async () => (await this.exemplars()).some(({ image }) => image);

  /** Return the estimated accuracy, or null if the server cannot estimate it. It is fetched once per version. */
  accuracy = () => (this.#accuracy ??= this.get("/accuracy").catch(() => null));

  /** Add photos as examples of a class, in batches. Return the merged answers of the server, or null without a token. */
  async add(label, files, progress = () => {}) {
    const lists = { key_ids: [], classes: [], duplicates: [], warnings: [], skipped: [] };
    const all = { ...lists, known: 0, since: this.info.version };
    let done = 0;
    for (const part of api.parts(files.map((file) => ["images", file]), BATCH)) {
      const added = await this.#change(this.#at("/keys"), api.form([["label", label], ...part]), false);
      if (!added) return null;
      for (const name of Object.keys(lists)) all[name].push(...added[name]);
      all.known += added.known;
      all.version = added.version;
      progress((done += part.length));
    }
    await this.refresh();
    return all;
  }

  /** Create an index from [label, file] pairs, fit it, and open it. */
  make(name, pairs) {
    const like = this.info?.images ? this.info.name : undefined;
    const photos = pairs.flatMap(([label, file]) => [["label", label], ["images", file]]);
    return this.#opened(`/v1/indexes${api.query({ like })}`, api.form([["name", name], ...photos]));
  }

  renameIndex = (name) => this.#opened(this.#at(), api.json({ name }, "PATCH"));
  duplicateIndex = (name) => this.#opened(this.#at("/duplicate"), api.json({ name }));
  deleteIndex = () => this.#opened(this.#at(), { method: "DELETE" });

  /** Change the list of indexes, and open the changed index, or another one if it was deleted. */
  async #opened(path, options) {
    const changed = await this.#change(path, options, false);
    if (changed) await this.reopen(changed.index);
    return changed;
  }

  fit = () => this.#change(this.#at("/fit"), { method: "POST" });
  remove = (keyIds) => this.#change(this.#at(`/keys${api.query({ key_id: keyIds })}`), { method: "DELETE" });
  /** Relabel shots, given as [key id, label] pairs, in one new version. */
  relabel = (moves) => this.#change(this.#at("/relabel"), api.json({ labels: Object.fromEntries(moves) }));
  /** Rename a class. If another class already has the new name, the two classes are merged. */
  rename = (of, label) => this.#change(this.#at("/rename"), api.json({ of, label }));
  /** Restore version `to`, provided that the index is still at version `since`. */
  rollback = (to, since) => this.#change(this.#at("/rollback"), api.json({ to, since }));

  /** Set or remove labels in the labelling session, or skip photos, and return the new state of the session. */
  setLabels = (change) => this.#change("/v1/label", { ...api.json(change), patience: 0 }, false);

  /** Keep a photo in the labelling session. */
  keepPhoto = (file) => this.#change("/v1/label/photos", api.form([["images", file]]), false);

  joinEncoder = (join) => this.#change("/v1/label/encoder", api.json({ join }), false);

  sortPhotos = (change) => this.#change("/v1/label/sort", api.json(change), false);

  #at = (what) => api.at(this.info.name, what);

  /** Send a change with the token. If the token is unknown, ask the user for it. Return null if the user gives none. */
  async #change(path, options, refresh = true) {
    for (let wrong = false; ; wrong = true) {
      const known = !wrong && sessionStorage.getItem(api.TOKEN);
      if (!known && !(await askToken())) return null;
      try {
        const changed = await api.request(path, options);
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
  const field = el("input", { id: "token", type: "password", autocomplete: "off", required: true });
  const code = (text) => el("code", {}, text);
  const where = ["You need the server’s token, which is the end of the address that ", code(api.printed.by), " printed, after ", code("#token=")];
  const known = sessionStorage.getItem(api.TOKEN);
  sessionStorage.removeItem(api.TOKEN);
  const content = [
    el("p", {}, ...where, ". It is remembered until you close this tab."),
    known && el("p", { class: "refused", id: "token-refused", role: "alert" }, "This is not the server’s token."),
    el("label", {}, "Token ", field),
  ];
  if (!(await agreed("token", "Token", content, "Continue"))) return false;
  sessionStorage.setItem(api.TOKEN, field.value);
  return true;
}

export const state = new State();
