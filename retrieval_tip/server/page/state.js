// The index that the page shows, and changes to it. Views listen: "index" is another index, "version" a newer one.

import * as api from "./api.js";
import { $, el } from "./dom.js";

const TOKEN = "retrieval-tip token";

class State extends EventTarget {
  info = null; // GET /v1/indexes/{name}
  labels = []; // by class id

  async open(name) {
    this.#take(await api.index(name));
    this.dispatchEvent(new Event("index"));
  }

  /** Fetch the index again; views hear of it where the version is another one. */
  async refresh() {
    const { name, version } = this.info;
    const info = await api.index(name);
    if (this.info.name !== name || info.version === version) return;
    this.#take(info);
    this.dispatchEvent(new Event("version"));
  }

  #take(info) {
    this.info = info;
    this.labels = [];
    for (const { class_id: id, label } of info.classes) this.labels[id] = label;
    $("class-names").replaceChildren(...info.classes.map(({ label }) => el("option", { value: label })));
  }

  /** Add an image as a shot; null where no token was given. */
  async add(label, file) {
    return this.#change((token) => api.addShot(this.info.name, label, file, token));
  }

  /** Remove shots; null where no token was given. */
  async remove(keyIds) {
    return this.#change((token) => api.removeShots(this.info.name, keyIds, token));
  }

  async #change(send) {
    let refused = "";
    for (;;) {
      const token = sessionStorage.getItem(TOKEN) ?? (await askToken(refused));
      if (token === null) return null;
      try {
        const changed = await send(token);
        sessionStorage.setItem(TOKEN, token);
        await this.refresh();
        return changed;
      } catch (error) {
        if (error.status !== 401) throw error;
        sessionStorage.removeItem(TOKEN);
        refused = error.message;
      }
    }
  }
}

/** Open a dialog; its return value once it is closed ("" where it was dismissed). */
export function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

async function askToken(refused) {
  $("token").value = "";
  $("token-refused").textContent = refused;
  $("token-refused").hidden = !refused;
  return (await ask($("token-dialog"))) === "ok" ? $("token").value : null;
}

$("token-cancel").addEventListener("click", () => $("token-dialog").close(""));

export const state = new State();
