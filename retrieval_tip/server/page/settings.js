// The settings alpha, beta and k, with a slider for each. A "change" event is fired for each new value.

import { $, el, plural } from "./dom.js";
import { state } from "./state.js";

const STEPS = 60; // number of steps per decade

/** Return the stops of a slider. They are 0 and a logarithmic scale of `decades` on either side of a setting. */
function stopsAround(own, decades) {
  const middle = own > 0 ? own : 1;
  const stop = (i) => (i === 0 ? middle : Number((middle * 10 ** (i / STEPS)).toPrecision(4)));
  return [0, ...Array.from({ length: 2 * decades * STEPS + 1 }, (_, i) => stop(i - decades * STEPS))];
}

/** Return the stops of k. They are all small numbers, then numbers in steps of 3 %, and finally all keys. */
function stopsUpTo(n) {
  const stops = [];
  for (let k = 1; k < n; k = Math.max(k + 1, Math.round(k * 1.03))) stops.push(k);
  return [...stops, "all"];
}

const SLIDERS = { // the label, what its ends mean, and its stops, given the setting of the index and the number of examples
  alpha: ["What counts more", ["class names", "photos"], (own) => stopsAround(own, 3)],
  beta: ["Which examples count", ["all examples", "only very similar ones"], (own) => stopsAround(own, 2)],
  k: ["How many examples count", ["only one", "all"], (_, n) => stopsUpTo(n)],
};

class Settings extends EventTarget {
  values = {}; // of each slider, and of tail
  #own = {}; // the values of the index
  #stops = {}; // of each slider

  constructor() {
    super();
    for (const [name, [text, ends]] of Object.entries(SLIDERS).reverse()) {
      const slider = el("input", { id: name, type: "range" });
      slider.addEventListener("input", () => this.#set({ [name]: this.#stops[name][slider.value] }));
      const meant = el("p", { class: "ends" }, ...ends.map((end) => el("span", {}, end)));
      $("settings").prepend(el("div", { class: "setting" }, el("label", { htmlFor: name }, text), slider, meant));
    }
    $("reset").addEventListener("click", () => this.#set(this.#own));
    state.addEventListener("index", () => this.#follow(true));
    state.addEventListener("version", () => this.#follow(false));
  }

  /** A string that identifies the settings. */
  get name() {
    return Object.values({ ...this.values, tail: this.values.k === "all" || this.values.tail }).join(" ");
  }

  /** Whether the user has changed a setting of the index. */
  get changed() {
    return Object.entries(this.#own).some(([name, value]) => this.values[name] !== value);
  }

  /** Switch to another index or version. If the user has not changed any setting, use those of the index. */
  #follow(another) {
    const { n_keys: n, text, tail } = state.info;
    $("alpha").parentElement.hidden = !text; // without class names, there are only photos
    const untouched = another || !this.changed;
    this.#own = { tail };
    for (const [name, [, , stops]] of Object.entries(SLIDERS)) {
      this.#own[name] = state.info[name];
      this.#stops[name] = stops(state.info[name], n);
    }
    if (untouched) this.values = this.#own;
    this.#show();
  }

  #set(values) {
    this.values = { ...this.values, ...values };
    this.#show();
    this.dispatchEvent(new Event("change"));
  }

  #show() {
    const { k, tail, ...others } = this.values;
    for (const [name, stops] of Object.entries(this.#stops)) {
      const [slider, value] = [$(name), this.values[name]];
      const at = stops.findIndex((stop) => stop === value || stop >= value);
      slider.max = stops.length - 1;
      slider.value = at < 0 ? slider.max : at;
      slider.dataset.value = value;
      slider.ariaValueText = name !== "k" ? value : value === "all" ? "all examples" : plural(value, "example");
    }
    $("reset").disabled = !this.changed;
    $("settings-title").textContent = this.changed ? "Settings (changed)" : "Settings";
    const words = [...Object.entries(others).map(([name, value]) => `--${name} ${value}`), `-k ${k}`];
    $("command").textContent = [...words, ...(k === "all" ? [] : [tail ? "--tail" : "--no-tail"])].join(" ");
  }
}

export const settings = new Settings();
