// One image on the page: its picture, what it is, and why. Numbers are in the DOM at full precision too (data-value).

import * as api from "./api.js";
import { el, failure, nameOf, percent, picture, short } from "./dom.js";
import { classify, computable, evidenceOf, weight } from "./method.js";
import { settings } from "./settings.js";
import { state } from "./state.js";

const TOP = 8;
const NEIGHBOURS = 5;

const byLabel = (a, b) => a?.rows[0].label === b?.rows[0].label;

/** One image. `view` is what it is part of: { left, changed(), unsure(), outdated(card), putAway(card) }. */
export class Card {
  static #count = 0;

  evidence = null;
  version = null; // of the index that the evidence is from
  served = null; // the server's answer: { name, rows }, for settings of that name
  shown = null; // { rows, how }
  before = null; // the answer before the index changed

  constructor(file, view) {
    this.file = file;
    this.view = view;
    this.gone = new AbortController();
    this.#build();
  }

  #build() {
    const id = `card-${++Card.#count}`;
    this.preview = el("img", { class: "preview", alt: `Your image ${this.file.name}` });
    this.verdict = el("h2", { id }, "…");
    this.probability = el("span", { class: "probability" });
    this.how = el("span", { class: "how" });
    this.was = el("p", { class: "was", hidden: true });
    this.state = el("p", { class: "state" }, "Waiting…");
    this.rows = el("tbody");
    this.neighbours = el("ol", { class: "neighbours" });
    this.notice = el("p", { class: "notice", role: "status" });
    const remove = el(
      "button",
      { type: "button", class: "remove", aria: { label: `Take ${this.file.name} off the page` } },
      "×",
    );
    remove.addEventListener("click", () => this.view.putAway(this));
    const table = el(
      "table",
      {},
      el("caption", { class: "unseen" }, "Top classes. Text and cache add up to the logit."),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          el("th", { scope: "col" }, "class"),
          el("th", { scope: "col" }, "probability"),
          el("th", { scope: "col", class: "text-part" }, "text"),
          el("th", { scope: "col", class: "cache-part" }, "cache"),
        ),
      ),
      this.rows,
    );
    this.answer = el(
      "div",
      { class: "answer", hidden: true },
      table,
      el("h3", {}, "Nearest keys"),
      this.neighbours,
      this.#correction(),
    );
    this.element = el(
      "article",
      { class: "card", aria: { labelledby: id, busy: "true" }, data: { input: this.file.name } },
      el("div", { class: "side" }, this.preview, el("p", { class: "file", title: this.file.name }, this.file.name)),
      el(
        "div",
        { class: "main" },
        el("div", { class: "headline" }, this.verdict, this.probability, this.how, remove),
        this.was,
        this.state,
        this.notice,
        this.answer,
      ),
    );
    this.remove = remove;
    const url = URL.createObjectURL(this.file);
    const done = () => URL.revokeObjectURL(url); // the element keeps the picture
    this.preview.addEventListener("load", done, { once: true });
    this.preview.addEventListener(
      "error",
      () => {
        done();
        this.preview.replaceWith(el("span", { class: "preview none" }, "no preview"));
      },
      { once: true },
    );
    this.preview.src = url;
  }

  #correction() {
    const input = el("input", { type: "text", autocomplete: "off", required: true });
    input.setAttribute("list", "class-names");
    const button = el("button", { type: "submit", disabled: true }, "Add as shot");
    const hint = el("p", { class: "hint" });
    input.addEventListener("input", () => {
      const label = input.value.trim();
      button.disabled = !label;
      button.textContent = label ? `Add as shot of ${label}` : "Add as shot";
      hint.textContent =
        label && !state.labels.includes(label) ? "A new class: its text comes from the index’s templates." : "";
    });
    const form = el("form", {}, el("label", {}, "It is ", input), button, hint);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (input.value.trim()) this.#add(input.value.trim(), button);
    });
    const refused = el(
      "p",
      { class: "hint" },
      "This server was started without ",
      el("code", {}, "--token"),
      ", so shots cannot be added.",
    );
    this.allow = () => {
      form.hidden = !state.info.changes;
      refused.hidden = state.info.changes;
    };
    return el("details", { class: "wrong" }, el("summary", {}, "This is wrong"), form, refused);
  }

  async #add(label, button) {
    button.disabled = true;
    this.notice.textContent = "Adding…";
    try {
      const added = await state.add(label, this.file);
      if (!added) this.notice.textContent = "";
      else if (added.key_ids.length) this.#added(label, added);
      else
        this.notice.textContent = added.skipped[0]?.reason ?? `It was a shot of ${label} already; nothing was added.`;
    } catch (error) {
      this.notice.replaceChildren(failure(error));
    }
    button.disabled = false;
  }

  #added(label, { key_ids: ids, version, classes, duplicates }) {
    const undo = el("button", { type: "button" }, "Undo");
    undo.addEventListener("click", async () => {
      undo.disabled = true;
      try {
        const removed = await state.remove(ids);
        const stays = classes.length ? ` The class ${label} stays, without shots.` : "";
        if (removed) this.notice.textContent = `Undone (version ${removed.version}).${stays}`;
        else undo.disabled = false;
      } catch (error) {
        this.notice.replaceChildren(failure(error));
      }
      if (!undo.isConnected) this.remove.focus();
    });
    const made = classes.length ? ", a new class" : "";
    this.notice.replaceChildren(`Added as shot of ${label}${made} (version ${version}). `, undo);
    if (duplicates.length) this.notice.append(el("span", { class: "hint" }, duplicates.join("; ")));
    undo.focus();
  }

  /** Begin anew, with another index. */
  begin() {
    Object.assign(this, { evidence: null, served: null, shown: null, before: null });
    this.answer.hidden = this.was.hidden = true;
    this.notice.replaceChildren();
    this.verdict.textContent = "…";
    this.probability.textContent = "";
    this.allow();
    if (state.info.images) this.classify();
    else this.fail(new api.Problem("This index takes features, not images."));
  }

  /** Ask the server about the image itself. */
  async classify() {
    const signal = AbortSignal.any([this.gone.signal, this.view.left]);
    const { name } = settings;
    this.working("Waiting…");
    const waiting = (problem) => this.working(`${problem.message} Trying again…`);
    const asked = { index: state.info.name, ...parameters(), evidence: true };
    try {
      const answer = await api.classifyFile(this.file, asked, { signal, waiting });
      if (!answer.results.length) throw new api.Problem(answer.skipped[0].reason);
      await this.take(answer, answer.results[0], name);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    }
  }

  /** Take an answer of the server that was given for settings of this name. */
  async take(answer, result, name) {
    if (answer.version !== state.info.version) await state.refresh(); // somebody else changed the index
    if (result.evidence) {
      this.evidence = evidenceOf(result.evidence);
      this.version = answer.version;
    }
    if (answer.version !== state.info.version) return this.view.outdated(this);
    if (result.evidence) this.#showNeighbours(result);
    this.served = { name, rows: rowsOf(result, this.evidence.text) };
    this.state.replaceChildren();
    this.element.setAttribute("aria-busy", "false");
    this.answer.hidden = false;
    this.render();
    if (this.shown.how === "estimate") this.view.unsure(); // the settings were moved meanwhile
  }

  get busy() {
    return this.element.getAttribute("aria-busy") === "true";
  }

  working(text) {
    this.element.setAttribute("aria-busy", "true");
    this.state.textContent = text;
  }

  fail(error) {
    this.element.setAttribute("aria-busy", "false");
    this.verdict.textContent = this.evidence ? this.verdict.textContent : this.file.name;
    this.state.replaceChildren(failure(error, () => this.classify()));
    this.view.changed();
  }

  get exact() {
    return this.evidence !== null && computable(state.info, this.evidence, settings);
  }

  get current() {
    return this.evidence !== null && this.version === state.info.version;
  }

  /** Show the answer for the settings as they are. */
  render() {
    if (!this.current) return;
    if (this.exact || this.served?.name !== settings.name) {
      const rows = classify(this.evidence, settings, state.info.temperature, TOP);
      for (const row of rows) row.label = state.labels[row.classId];
      this.shown = { rows, how: this.exact ? "page" : "estimate" };
    } else {
      this.shown = { rows: this.served.rows, how: "server" };
    }
    this.#showAnswer();
    this.#showWas();
    this.view.changed();
  }

  #showAnswer() {
    const { rows, how } = this.shown;
    const [winner] = rows;
    this.verdict.textContent = winner.label;
    this.probability.textContent = percent(winner.probability);
    this.how.textContent = how === "estimate" ? "estimate" : "";
    Object.assign(this.element.dataset, {
      label: winner.label,
      probability: winner.probability,
      textLogit: winner.text,
      cacheLogit: winner.cache,
      how,
    });
    const ends = rows.flatMap(({ text, cache }) => [text, text + cache]).filter(Number.isFinite);
    const low = Math.min(0, ...ends);
    const scale = 100 / (Math.max(0, ...ends) - low || 1);
    while (this.rows.children.length > rows.length) this.rows.lastChild.remove();
    rows.forEach((row, i) => {
      if (!this.rows.children[i]) this.rows.append(rowElement());
      fillRow(this.rows.children[i], row, low, scale);
    });
    const counted = settings.k === "all" ? Infinity : settings.k;
    [...this.neighbours.children].forEach((item, i) => {
      const value = weight(Number(item.dataset.affinity), settings.beta);
      item.classList.toggle("beyond", i >= counted);
      const cell = item.querySelector(".weight");
      cell.dataset.value = value;
      cell.textContent = i >= counted ? "beyond k" : `weight ${short(value)}`;
    });
  }

  /** The nearest keys, also those beyond k, which the server does not name: a larger k may count them. */
  #showNeighbours({ neighbours: named, labels }) {
    const { keyIds, classIds, affinities } = this.evidence;
    const sources = new Map(named.map(({ key_id: id, source }) => [id, source]));
    const gives = new Map(named.map(({ key_id: id, gives: each }) => [id, each]));
    const items = keyIds.slice(0, NEIGHBOURS).map((id, i) => {
      const label = state.labels[classIds[i]];
      return el(
        "li",
        { data: { keyId: id, affinity: affinities[i] }, title: sources.get(id) ?? `key ${id}` },
        picture(api.pictureOf(state.info.name, id), 240, nameOf(sources.get(id) ?? `key ${id}`)),
        el("span", { class: "name" }, label),
        el("span", { class: "affinity", data: { value: affinities[i] } }, `affinity ${affinities[i].toFixed(3)}`),
        el("span", { class: "weight" }),
        ...given(gives.get(id), labels),
      );
    });
    this.neighbours.replaceChildren(...items);
  }

  /** What the answer was before the index changed, where that is to be seen. */
  #showWas() {
    const { before, shown } = this;
    const changed =
      before !== null &&
      (!byLabel(before, shown) || Math.abs(before.rows[0].probability - shown.rows[0].probability) >= 0.0005);
    this.was.hidden = !changed;
    this.element.classList.toggle("changed", changed);
    if (!changed) return;
    const [old] = before.rows;
    this.was.dataset.label = old.label;
    this.was.dataset.probability = old.probability;
    this.was.textContent = `was ${byLabel(before, shown) ? "" : `${old.label} `}${percent(old.probability)}`;
  }
}

/** What a neighbour gave to the classes that are shown: where values were solved, some to each, also below 0. */
function given(gives, labels) {
  if (!gives || state.info.values === "one-hot") return [];
  return labels.map((label, i) => {
    const sign = gives[i] > 0 ? "+" : "";
    return el("span", { class: "gives", data: { value: gives[i] } }, `${sign}${short(gives[i])} to ${label}`);
  });
}

function rowElement() {
  return el(
    "tr",
    {},
    el(
      "th",
      { scope: "row" },
      el("span", { class: "name" }),
      el(
        "span",
        { class: "bar", aria: { hidden: "true" } },
        el("i", { class: "text-bar" }),
        el("i", { class: "cache-bar" }),
      ),
    ),
    el("td", { class: "p" }),
    el("td", { class: "text-part" }),
    el("td", { class: "cache-part" }),
  );
}

function fillRow(element, { label, probability, text, cache }, low, scale) {
  const [head, p, textCell, cacheCell] = element.children;
  element.dataset.label = label;
  head.firstChild.textContent = label;
  const [textBar, cacheBar] = head.lastChild.children;
  head.lastChild.style.setProperty("--zero", `${-low * scale}%`);
  place(textBar, 0, text, low, scale);
  place(cacheBar, text, text + cache, low, scale);
  element.style.setProperty("--p", probability);
  for (const [cell, value, shown] of [
    [p, probability, percent(probability)],
    [textCell, text, short(text)],
    [cacheCell, cache, short(cache)],
  ]) {
    cell.dataset.value = value;
    cell.textContent = shown;
  }
}

function place(bar, from, to, low, scale) {
  bar.style.left = `${(Math.min(from, to) - low) * scale}%`;
  bar.style.width = `${Math.abs(to - from) * scale || 0}%`;
}

/** What the server is asked, of images and of features alike. */
export const parameters = () => ({ ...settings.values, top: TOP, neighbours: NEIGHBOURS, logits: true });

/** The server's answer as rows: what of a logit is not text is cache. The winner's own parts are the server's. */
function rowsOf({ labels, probabilities, logits, text_logit: text, cache_logit: cache }, texts) {
  return labels.map((label, i) => {
    const classId = state.labels.indexOf(label);
    if (i === 0) return { classId, label, probability: probabilities[i], text, cache };
    return {
      classId,
      label,
      probability: probabilities[i],
      text: texts[classId],
      cache: (logits?.[classId] ?? NaN) - texts[classId],
    };
  });
}
