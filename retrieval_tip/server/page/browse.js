// The index view: settings, classes, a map of the keys, shots, and those that look wrong.

import * as api from "./api.js";
import { $, debounced, el, failure, nameOf, picture, plural, say, short } from "./dom.js";
import { colour, KeyMap } from "./map.js";
import { ask, state } from "./state.js";

const PAGE = 48; // shots at a time
const CLASSES = 200; // classes listed at a time; the filter finds the others
const WORST = 8; // suspicious shots shown before more are wanted
const LEGEND = 30; // classes that colours can still tell apart, more or less

/** A part of the view that is fetched: says that it loads, what went wrong, or that there is nothing. */
class Part {
  #asked = new AbortController();

  constructor(name, fetchPart, show) {
    this.state = $(`${name}-state`);
    this.fetchPart = fetchPart;
    this.show = show;
  }

  async load() {
    this.#asked.abort(); // an answer that comes late does not replace a later one
    this.#asked = new AbortController();
    const { signal } = this.#asked;
    this.state.textContent = "Loading…";
    const waiting = (problem) => (this.state.textContent = `${problem.message} Trying again…`);
    try {
      const found = await this.fetchPart({ signal, waiting });
      this.state.textContent = this.show(found) ?? "";
    } catch (error) {
      if (error.name !== "AbortError") this.state.replaceChildren(failure(error, () => this.load()));
    }
  }
}

let shownVersion = null; // "name version" that the view shows
let offset = 0;
const shotsByKey = new Map(); // what is known of keys, for the map; emptied with every version

/** Called as the view is opened: it is loaded anew where the index has changed since. */
export function showIndexView() {
  const wanted = `${state.info.name} ${state.info.version}`;
  if (wanted === shownVersion) return;
  shownVersion = wanted;
  shotsByKey.clear();
  showAbout();
  showClasses();
  for (const part of [map, shots, audit]) part.load();
}

function showAbout() {
  const { info } = state;
  const facts = {
    name: info.name,
    version: `${info.version} (${info.change}), ${new Date(info.created_at).toLocaleString()}`,
    keys: `${info.n_keys.toLocaleString("en")} of ${info.d} dimensions`,
    classes: info.n_classes.toLocaleString("en"),
    alpha: info.alpha,
    beta: info.beta,
    k: info.k === "all" ? "all" : `${info.k}, ${info.tail ? "with" : "without"} tail`,
    temperature: info.temperature,
    "logit scale": info.logit_scale,
    "FAISS index": info.exact_search ? info.index : `${info.index}, approximate`,
    backbone: info.backbone ?? "none: features only",
    templates: info.text ? info.templates.join(" · ") || "text from elsewhere" : "no text",
    metric: info.metric === "none" ? null : "within-class",
    values: info.values === "one-hot" ? null : info.values,
  };
  fill($("about"), facts);
  fill($("provenance"), info.provenance);
}

function fill(list, facts) {
  const said = Object.entries(facts).filter(([, value]) => value !== null && value !== "");
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
  list.replaceChildren(...said.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, text(value)))));
}

function showClasses() {
  const wanted = $("classes-filter").value.trim().toLowerCase();
  const found = state.info.classes.filter(({ label }) => label.toLowerCase().includes(wanted));
  const most = Math.max(1, ...state.info.classes.map(({ keys }) => keys));
  $("classes-count").textContent =
    found.length < state.info.n_classes ? `${found.length} of ${state.info.n_classes}` : String(found.length);
  $("classes-list").replaceChildren(...found.slice(0, CLASSES).map((one) => classElement(one, most)));
  $("classes-more").textContent = !found.length
    ? "No class of that name."
    : found.length > CLASSES
      ? `${(found.length - CLASSES).toLocaleString("en")} more: the filter finds them.`
      : "";
}

function classElement({ class_id: id, label, keys }, most) {
  const dot = el("i", { class: "dot", aria: { hidden: "true" } });
  dot.hidden = state.info.n_classes > LEGEND;
  dot.style.background = colour(id);
  const button = el(
    "button",
    { type: "button", title: `Shots of ${label}`, data: { label, keys } },
    dot,
    el("span", { class: "name" }, label),
    el("span", { class: "count" }, String(keys), el("span", { class: "unseen" }, keys === 1 ? " key" : " keys")),
  );
  button.style.setProperty("--share", `${(100 * keys) / most}%`);
  button.addEventListener("click", () => {
    $("shots-class").value = label;
    filterShots();
    $("shots-title").scrollIntoView();
    $("shots-title").focus({ preventScroll: true });
  });
  for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => keyMap.highlight(id));
  for (const event of ["pointerleave", "blur"]) button.addEventListener(event, highlightChosen);
  return el("li", {}, button);
}

/** On the map the class that the shots are filtered by stands out, or else none. */
function highlightChosen() {
  const classId = state.labels.indexOf($("shots-class").value);
  keyMap.highlight(classId < 0 ? null : classId);
}

/** What is known of a key, as text. */
const described = ({ key_id: id, label, source }) => [
  el("strong", { class: "name" }, label),
  el("span", { class: "source", title: source }, nameOf(source)),
  el("span", { class: "hint" }, `key ${id}`),
];

async function removeShot(shot, heading) {
  $("confirm-shot").replaceChildren(picture(shot.image, 160, nameOf(shot.source)), el("p", {}, ...described(shot)));
  if ((await ask($("confirm-dialog"))) !== "ok") return;
  $("problem").hidden = true;
  try {
    const removed = await state.remove([shot.key_id]);
    if (!removed) return;
    say(`Key ${shot.key_id} removed, version ${removed.version}.`);
    heading.focus();
  } catch (error) {
    $("problem").replaceChildren(failure(error));
    $("problem").hidden = false;
  }
}

function removeButton(shot, heading) {
  if (!state.info.changes) return null;
  const button = el(
    "button",
    { type: "button", class: "quiet", aria: { label: `Remove key ${shot.key_id}, ${shot.label}` } },
    "Remove",
  );
  button.addEventListener("click", () => removeShot(shot, heading));
  return button;
}

const unchangeable = () =>
  state.info.changes ? "" : " The server was started without --token, so none can be removed here.";

const shots = new Part(
  "shots",
  (options) =>
    api.keys(
      state.info.name,
      { label: $("shots-class").value, source: $("shots-source").value, offset, limit: PAGE },
      options,
    ),
  ({ total, keys }) => {
    if (!keys.length && offset > 0) {
      offset = Math.max(0, offset - PAGE); // the last of a page was removed
      return void shots.load();
    }
    $("shots-count").textContent = total.toLocaleString("en");
    $("shots").replaceChildren(
      ...keys.map((shot) =>
        el(
          "li",
          { data: { keyId: shot.key_id } },
          picture(shot.image, 240, nameOf(shot.source)),
          ...described(shot),
          removeButton(shot, $("shots-title")),
        ),
      ),
    );
    $("shots-pager").hidden = total <= PAGE;
    $("shots-range").textContent = `${offset + 1} to ${offset + keys.length} of ${total.toLocaleString("en")}`;
    $("shots-previous").disabled = offset === 0;
    $("shots-next").disabled = offset + PAGE >= total;
    if (!total) return "No shots like that.";
    return unchangeable();
  },
);

function filterShots() {
  offset = 0;
  shots.load();
  highlightChosen();
}

const map = new Part(
  "map",
  (options) => api.map(state.info.name, $("map-method").value || "pca", options),
  (found) => {
    $("map-methods").hidden = found.methods.length < 2;
    if ($("map-method").children.length !== found.methods.length) {
      $("map-method").replaceChildren(
        ...found.methods.map((method) => el("option", { value: method }, method.toUpperCase())),
      );
    }
    $("map-method").value = found.method;
    const part =
      found.key_ids.length < found.total
        ? `${found.key_ids.length.toLocaleString("en")} of ${found.total.toLocaleString("en")} keys`
        : "";
    const explained = found.explained?.map((share) => `${Math.round(100 * share)} %`).join(" and ");
    $("map-facts").textContent = [part, explained && `the axes hold ${explained} of the variance`]
      .filter(Boolean)
      .join("; ");
    $("map").hidden = !found.key_ids.length;
    $("map-shot").replaceChildren();
    keyMap.show(found);
    return found.key_ids.length ? "" : "This index has no keys.";
  },
);

let pointed = null;
const keyMap = new KeyMap($("map-canvas"), async (keyId) => {
  pointed = keyId;
  const { name } = state.info;
  try {
    if (!shotsByKey.has(keyId)) shotsByKey.set(keyId, (await api.keys(name, { key_id: keyId })).keys[0]);
    const shot = shotsByKey.get(keyId);
    if (pointed === keyId && shot)
      $("map-shot").replaceChildren(picture(shot.image, 320, nameOf(shot.source)), el("p", {}, ...described(shot)));
  } catch (error) {
    if (pointed === keyId) $("map-shot").replaceChildren(failure(error));
  }
});

const audit = new Part(
  "audit",
  async (options) => {
    const { name } = state.info;
    const found = await api.audit(name, options);
    const both = found.shots.flatMap((shot) => [shot.key_id, shot.nearest_key_id]);
    const ids = [...new Set(both.filter((id) => id !== null))];
    const known = ids.length ? await api.keys(name, { key_id: ids, limit: ids.length }, options) : { keys: [] };
    return { ...found, images: new Map(known.keys.map((shot) => [shot.key_id, shot.image])) };
  },
  ({ total, shots: all, images }) => {
    const found = all.map((shot) => ({
      ...shot,
      image: images.get(shot.key_id),
      nearest: images.get(shot.nearest_key_id),
    }));
    $("audit-count").textContent = total.toLocaleString("en");
    $("audit").replaceChildren(...found.slice(0, WORST).map(suspicious));
    $("audit-more").hidden = found.length <= WORST;
    $("audit-more").textContent = `Show the worst ${found.length}`;
    $("audit-more").onclick = () => {
      $("audit").append(...found.slice(WORST).map(suspicious));
      $("audit-more").hidden = true;
      $("audit").children[WORST].querySelector("button")?.focus();
    };
    return total ? "" : "None: every shot’s neighbours agree with its label.";
  },
);

function suspicious(shot) {
  const figure = (url, source, label, caption) =>
    el(
      "figure",
      {},
      picture(url, 240, nameOf(source)),
      el("figcaption", {}, el("span", { class: "hint" }, caption), el("span", { class: "name" }, label)),
    );
  const { suggested, duplicate_of: twin } = shot;
  return el(
    "li",
    { data: { keyId: shot.key_id } },
    figure(shot.image, shot.source, shot.label, "labelled"),
    figure(shot.nearest, shot.nearest_source ?? "", shot.nearest_label ?? "–", "its nearest"),
    el(
      "div",
      {},
      suggested === null ? null : el("p", {}, "rather ", el("strong", { class: "name" }, suggested), "?"),
      el(
        "p",
        { class: "hint", data: { value: shot.margin } },
        `margin ${short(shot.margin)}, affinity ${short(shot.nearest_affinity)}`,
      ),
      el("p", { class: "source", title: shot.source }, nameOf(shot.source, 2)),
      twin === null ? null : el("p", { class: "hint" }, `The same image as key ${twin}.`),
      removeButton(shot, $("audit-title")),
    ),
  );
}

const typed = debounced(250, filterShots);
$("shots-class").addEventListener("input", typed);
$("shots-source").addEventListener("input", typed);
$("classes-filter").addEventListener("input", showClasses);
$("map-method").addEventListener("change", () => map.load());
$("shots-previous").addEventListener("click", () => turn(-PAGE));
$("shots-next").addEventListener("click", () => turn(PAGE));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.info && showClasses());

function turn(by) {
  offset = Math.max(0, offset + by);
  shots.load();
  $("shots-title").focus();
}

state.addEventListener("index", () => {
  for (const id of ["classes-filter", "shots-class", "shots-source"]) $(id).value = "";
  offset = 0;
  keyMap.highlight(null);
});
state.addEventListener("version", () => !$("index-view").hidden && showIndexView());
