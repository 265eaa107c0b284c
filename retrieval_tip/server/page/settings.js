// The settings alpha, beta and k, with a slider for each. A "change" event is fired for each new value.

import { $, plural } from "./dom.js";
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

class Settings extends EventTarget {
  values = {}; // alpha, beta, k and tail
  #own = {}; // the values of the index
  #stops = {}; // of each slider

  constructor() {
    super();
    for (const name of ["alpha", "beta", "k"])
      $(name).addEventListener("input", () => this.#set({ [name]: this.#stops[name][$(name).value] }));
    $("reset").addEventListener("click", () => this.#set(this.#own));
    state.addEventListener("index", () => this.#follow(true));
    state.addEventListener("version", () => this.#follow(false));
  }

  /** A string that identifies the settings. */
  get name() {
    const { alpha, beta, k, tail } = this.values;
    return [alpha, beta, k, k === "all" || tail].join(" ");
  }

  /** Whether the user has changed a setting of the index. */
  get changed() {
    return Object.entries(this.#own).some(([name, value]) => this.values[name] !== value);
  }

  /** Switch to another index or version. If the user has not changed any setting, use those of the index. */
  #follow(another) {
    const { alpha, beta, k, tail, n_keys: n, text } = state.info;
    $("trust").hidden = !text; // without class names, there are only photos
    const untouched = another || !this.changed;
    this.#own = { alpha, beta, k, tail };
    this.#stops = { alpha: stopsAround(alpha, 3), beta: stopsAround(beta, 2), k: stopsUpTo(n) };
    if (untouched) this.values = this.#own;
    this.#show();
  }

  #set(values) {
    this.values = { ...this.values, ...values };
    this.#show();
    this.dispatchEvent(new Event("change"));
  }

  #show() {
    const { alpha, beta, k, tail } = this.values;
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
    $("command").textContent = `--alpha ${alpha} --beta ${beta} -k ${k === "all" ? "all" : `${k} ${tail ? "--tail" : "--no-tail"}`}`;
  }
}

export const settings = new Settings();
