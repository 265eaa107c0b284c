// The settings alpha, beta, k and tail, with sliders and number inputs. A "change" event is fired for each new value.

import { $, plural } from "./dom.js";
import { state } from "./state.js";

const RANGES = { alpha: 3, beta: 2 }; // decades on either side of the setting of the index
const STEPS = 60; // number of steps per decade

/** Return the stops of a slider. They are 0 and a logarithmic scale that includes the setting of the index. */
function stopsAround(own, decades) {
  const middle = own > 0 ? own : 1;
  const stop = (i) => (i === 0 ? middle : Number((middle * 10 ** (i / STEPS)).toPrecision(4)));
  return [0, ...Array.from({ length: 2 * decades * STEPS + 1 }, (_, i) => stop(i - decades * STEPS))];
}

/** Return the stops of k. They are all small numbers, then numbers in steps of 3 %, and finally all keys. */
function stopsUpTo(n) {
  const stops = [];
  for (let k = 1; k < n; k = Math.max(k + 1, Math.round(k * 1.03))) stops.push(k);
  return [...stops, n];
}

function nearest(stops, value) {
  const apart = stops.map((stop) => Math.abs(Math.log(stop || 1e-300) - Math.log(value || 1e-300)));
  return apart.indexOf(Math.min(...apart));
}

class Settings extends EventTarget {
  values = {}; // alpha, beta, k and tail
  #own = {}; // the values of the index
  #stops = {}; // of each slider

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
    this.#stops = { alpha: stopsAround(alpha, RANGES.alpha), beta: stopsAround(beta, RANGES.beta), k: stopsUpTo(n) };
    for (const [name, stops] of Object.entries(this.#stops)) $(`${name}-slider`).max = stops.length - 1;
    $("k").max = n;
    if (untouched) this.values = this.#own;
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
    this.values = { ...this.values, ...values };
    this.#showAll(typing);
    this.dispatchEvent(new Event("change"));
  }

  #showAll(typing) {
    const { alpha, beta, k, tail } = this.values;
    for (const name of ["alpha", "beta", "k"]) this.#show(name, name === typing);
    $("tail").checked = tail;
    $("tail").disabled = k === "all";
    $("reset").disabled = !this.changed;
    $("settings-title").textContent = this.changed ? "Settings (changed)" : "Settings";
    $("command").textContent = `--alpha ${alpha} --beta ${beta} -k ${k === "all" ? "all" : `${k} ${tail ? "--tail" : "--no-tail"}`}`;
  }

  /** Show a setting on its slider and in its input. The input is not changed while the user is typing. */
  #show(name, typing = false) {
    const value = this.values[name];
    const last = this.#stops[name].length - 1;
    const slider = $(`${name}-slider`);
    if (!typing) {
      $(name).value = value === "all" ? "" : Number(value.toPrecision(6)); // the command shows all digits
      $(name).removeAttribute("aria-invalid");
    }
    $(name).dataset.value = value;
    slider.value = value === "all" ? last : nearest(this.#stops[name], value);
    slider.ariaValueText = name === "k" ? (value === "all" ? "all examples" : plural(value, "example")) : String(value);
    slider.style.setProperty("--filled", `${(100 * slider.value) / Math.max(1, last)}%`);
  }
}

export const settings = new Settings();
