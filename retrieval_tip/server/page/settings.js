// alpha, beta, k and tail: sliders with number inputs beside them. "change" is fired for each new value.

import { $, plural } from "./dom.js";
import { state } from "./state.js";

const RANGES = { alpha: 3, beta: 2 }; // decades to either side of the index's own value
const STEPS = 60; // a decade

/** Where a slider stops: 0, then evenly in the logarithm around the index's own value, which is among them exactly. */
function stopsAround(own, decades) {
  const middle = own > 0 ? own : 1;
  const stops = [0];
  for (let i = -decades * STEPS; i <= decades * STEPS; i++) {
    stops.push(i === 0 ? middle : Number((middle * 10 ** (i / STEPS)).toPrecision(4)));
  }
  return stops;
}

/** Every number of keys while they are few, then steps of 3 %, and at last all. */
function stopsUpTo(n) {
  const stops = [];
  for (let k = 1; k < n; k = Math.max(k + 1, Math.round(k * 1.03))) stops.push(k);
  return [...stops, n];
}

/** The stop nearest to a value, by ratio. */
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
      $(name).addEventListener("change", () => this.#show(name)); // what is not valid gives way to what holds
      $(`${name}-slider`).addEventListener("input", () => this.#slid(name));
    }
    $("tail").addEventListener("change", () => this.#set({ tail: $("tail").checked }));
    $("reset").addEventListener("click", () => this.reset());
    $("settings").addEventListener("submit", (event) => event.preventDefault());
    state.addEventListener("index", () => this.#follow(true));
    state.addEventListener("version", () => this.#follow(false));
  }

  get values() {
    return { alpha: this.alpha, beta: this.beta, k: this.k, tail: this.tail };
  }

  /** A name for what is set, to compare answers by. */
  get name() {
    return [this.alpha, this.beta, this.k, this.k === "all" || this.tail].join(" ");
  }

  reset() {
    this.#set(this.#own);
  }

  /** Another index, or a new version of it: settings that nobody moved are the index's own. */
  #follow(another) {
    const { alpha, beta, k, tail, n_keys: n } = state.info;
    const untouched = another || this.#same();
    this.#own = { alpha, beta, k, tail };
    this.#stops = { alpha: stopsAround(alpha, RANGES.alpha), beta: stopsAround(beta, RANGES.beta), k: stopsUpTo(n) };
    for (const [name, stops] of Object.entries(this.#stops)) $(`${name}-slider`).max = stops.length - 1;
    $("k").max = n;
    if (untouched) Object.assign(this, this.#own);
    this.#showAll();
  }

  #same() {
    return Object.entries(this.#own).every(([name, value]) => this[name] === value);
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
    $("reset").disabled = this.#same();
    const k = this.k === "all" ? "-k all" : `-k ${this.k} ${this.tail ? "--tail" : "--no-tail"}`;
    $("settings-title").textContent = this.#same() ? "Settings" : "Settings, changed";
    $("command").textContent = `--alpha ${this.alpha} --beta ${this.beta} ${k}`;
  }

  /** Both faces of a setting; what is being typed stays as it is. */
  #show(name, typing = false) {
    const value = this[name];
    const stops = this.#stops[name];
    const slider = $(`${name}-slider`);
    if (!typing) {
      $(name).value = value === "all" ? "" : Number(value.toPrecision(6)); // to read; the command shows all digits
      $(name).removeAttribute("aria-invalid");
    }
    $(name).dataset.value = value;
    const at = value === "all" ? stops.length - 1 : nearest(stops, value);
    if (Number(slider.value) !== at) slider.value = at;
    const said = name === "k" ? (value === "all" ? "all photographs" : plural(value, "photograph")) : String(value);
    slider.setAttribute("aria-valuetext", said);
    slider.style.setProperty("--filled", `${(100 * at) / Math.max(1, stops.length - 1)}%`);
  }
}

export const settings = new Settings();
