// The settings alpha, beta, k and tail, with sliders and number inputs. A "change" event is fired for each new value.

import { $, plural } from "./dom.js";
import { state } from "./state.js";

const RANGES = { alpha: 3, beta: 2 }; // decades on either side of the setting of the index
const STEPS = 60; // number of steps per decade

/** Return the stops of a slider. They are 0 and a logarithmic scale that includes the setting of the index. */
function stopsAround(own, decades) {
  const middle = own > 0 ? own : 1;
  const stops = [0];
  for (let i = -decades * STEPS; i <= decades * STEPS; i++) {
    stops.push(i === 0 ? middle : Number((middle * 10 ** (i / STEPS)).toPrecision(4)));
  }
  return stops;
}

/** Return the stops of k. They are all small numbers, then numbers in steps of 3 %, and finally all keys. */
function stopsUpTo(n) {
  const stops = [];
  for (let k = 1; k < n; k = Math.max(k + 1, Math.round(k * 1.03))) stops.push(k);
  return [...stops, n];
}

/** Return the index of the stop whose ratio to a value is closest to 1. */
function nearest(stops, value) {
  let best = 0;
  const far = (stop) => Math.abs(Math.log(stop || 1e-300) - Math.log(value || 1e-300));
  stops.forEach((stop, i) => (best = far(stop) < far(stops[best]) ? i : best));
  return best;
}

class Settings extends EventTarget {
  alpha = 0;
  beta = 0;
  k = "all";
  tail = true;
  #own = {};
  #stops = {};

  constructor() {
    super();
    for (const name of ["alpha", "beta", "k"]) {
      $(name).addEventListener("input", () => this.#typed(name));
      $(name).addEventListener("change", () => this.#show(name)); // replaces an invalid entry with the current value
      $(`${name}-slider`).addEventListener("input", () => this.#slid(name));
    }
    $("tail").addEventListener("change", () => this.#set({ tail: $("tail").checked }));
    $("reset").addEventListener("click", () => this.#set(this.#own));
    $("settings").addEventListener("submit", (event) => event.preventDefault());
    state.addEventListener("index", () => this.#follow(true));
    state.addEventListener("version", () => this.#follow(false));
  }

  get values() {
    return { alpha: this.alpha, beta: this.beta, k: this.k, tail: this.tail };
  }

  /** A string that identifies the settings. */
  get name() {
    return [this.alpha, this.beta, this.k, this.k === "all" || this.tail].join(" ");
  }

  /** Whether the user has changed a setting of the index. */
  get changed() {
    return Object.entries(this.#own).some(([name, value]) => this[name] !== value);
  }

  /** Switch to another index or version. If the user has not changed any setting, use those of the index. */
  #follow(another) {
    const { alpha, beta, k, tail, n_keys: n } = state.info;
    const untouched = another || !this.changed;
    this.#own = { alpha, beta, k, tail };
    this.#stops = { alpha: stopsAround(alpha, RANGES.alpha), beta: stopsAround(beta, RANGES.beta), k: stopsUpTo(n) };
    for (const [name, stops] of Object.entries(this.#stops)) $(`${name}-slider`).max = stops.length - 1;
    $("k").max = n;
    if (untouched) Object.assign(this, this.#own);
    this.#showAll();
  }

  #typed(name) {
    const input = $(name);
    const valid = input.checkValidity();
    input.setAttribute("aria-invalid", String(!valid));
    if (valid) this.#set({ [name]: input.value === "" ? "all" : Number(input.value) }, name);
  }

  #slid(name) {
    const at = Number($(`${name}-slider`).value);
    const stops = this.#stops[name];
    this.#set({ [name]: name === "k" && at === stops.length - 1 ? "all" : stops[at] });
  }

  #set(values, typing) {
    Object.assign(this, values);
    this.#showAll(typing);
    this.dispatchEvent(new Event("change"));
  }

  #showAll(typing) {
    for (const name of ["alpha", "beta", "k"]) this.#show(name, name === typing);
    $("tail").checked = this.tail;
    $("tail").disabled = this.k === "all";
    $("reset").disabled = !this.changed;
    const k = this.k === "all" ? "-k all" : `-k ${this.k} ${this.tail ? "--tail" : "--no-tail"}`;
    $("settings-title").textContent = this.changed ? "Settings (changed)" : "Settings";
    $("command").textContent = `--alpha ${this.alpha} --beta ${this.beta} ${k}`;
  }

  /** Show a setting on its slider and in its input. The input is not changed while the user is typing. */
  #show(name, typing = false) {
    const value = this[name];
    const stops = this.#stops[name];
    const slider = $(`${name}-slider`);
    if (!typing) {
      $(name).value = value === "all" ? "" : Number(value.toPrecision(6)); // the command shows all digits
      $(name).removeAttribute("aria-invalid");
    }
    $(name).dataset.value = value;
    const at = value === "all" ? stops.length - 1 : nearest(stops, value);
    if (Number(slider.value) !== at) slider.value = at;
    const spoken = name === "k" ? (value === "all" ? "all examples" : plural(value, "example")) : String(value);
    slider.setAttribute("aria-valuetext", spoken);
    slider.style.setProperty("--filled", `${(100 * at) / Math.max(1, stops.length - 1)}%`);
  }
}

export const settings = new Settings();
