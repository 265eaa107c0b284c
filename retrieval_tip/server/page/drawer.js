// The open photo, with its answer, the examples for and against this answer, and the calculation.

import * as api from "./api.js";
import { classNames, step, teach } from "./classify.js";
import { classForm } from "./dialogs.js";
import { $, chips, cut, el, isBare, nameOf, percent, picture, plural, short } from "./dom.js";
import { state } from "./state.js";

const SWIPED = 64; // px that a finger moves to the side to confirm or refuse the answer

let photo = null;
let wrong = null; // the photo whose answer is wrong
let touched = null; // where a finger was put down

export const openPhoto = () => photo;

const clicks = {
  "drawer-close": leave,
  "drawer-previous": () => step(-1),
  "drawer-next": () => step(1),
  "drawer-right": () => give(photo.winner.label),
  "drawer-wrong": correct,
};
for (const [id, onclick] of Object.entries(clicks)) $(id).addEventListener("click", onclick);
$("drawer").addEventListener("keydown", (event) => {
  if (event.key === "Escape") leave();
  else if (event.target.closest("input, select, summary") || !isBare(event)) return;
  else if (event.key === "ArrowLeft" || event.key === "ArrowRight") step(event.key === "ArrowLeft" ? -1 : 1);
  else if (/^[123]$/.test(event.key)) give(photo?.choices[Number(event.key) - 1]);
  else if (event.key === "w") correct();
  else if (event.key === "Enter" && !event.target.closest("button") && !$("drawer-right").hidden) give(photo.winner.label);
  else return;
  event.preventDefault();
});
for (const type of ["touchstart", "touchend"]) $("drawer").addEventListener(type, swipe, { passive: true });
const field = classForm($("drawer-form"), "Add as example", () => classNames(), give);

/** On a touch screen, swipe right for Right and left for Wrong. */
function swipe(event) {
  const { clientX: x, clientY: y } = event.changedTouches[0];
  if (event.type === "touchstart") return (touched = event.touches.length === 1 && !event.target.closest("input") ? [x, y] : null);
  const [across, down] = touched ? [x - touched[0], y - touched[1]] : [0, 0];
  if (Math.abs(across) < Math.max(SWIPED, 2 * Math.abs(down))) return;
  const button = $(across > 0 ? "drawer-right" : "drawer-wrong");
  if (button.checkVisibility()) button.click();
}

function correct() {
  if (!photo?.shown || !state.info.changes) return;
  wrong = photo;
  showCorrection();
  field.focus();
}

/** Add the photo as an example of a class. */
function give(label) {
  if (label && state.info.changes) teach([photo], label);
}

export function open(which) {
  const another = which !== photo;
  photo = which;
  $("drawer").hidden = false;
  document.body.classList.add("drawn");
  if (another) {
    field.value = "";
    showPicture();
    $("drawer").scrollTop = 0;
    $("decided-more").open = false;
  }
  show();
}

const showPicture = () => $("drawer-picture").replaceChildren(photo.image(1024, `Your photo ${photo.name}`));

export function close() {
  photo = null;
  $("drawer").hidden = true;
  document.body.classList.remove("drawn");
}

/** Close the photo, and go back to the grid. */
export function leave() {
  close();
  $("grid").focus();
}

export function show() {
  if (!photo) return;
  const { shown, winner, picture: frame } = photo;
  if (frame && $("drawer-picture").firstChild.src !== frame) showPicture();
  $("drawer").ariaBusy = String(photo.busy);
  $("drawer-file").textContent = cut(photo.name, 40);
  $("drawer-file").title = photo.name;
  $("drawer-state").textContent = photo.problem?.message ?? (photo.busy ? "Classifying…" : "");
  $("drawer-answer").hidden = !shown;
  if (!shown) {
    $("drawer-title").textContent = cut(photo.name, 40);
    $("drawer-probability").textContent = "";
    return;
  }
  $("drawer-title").textContent = photo.unanswered ? "No match" : cut(winner.label, 40);
  $("drawer-title").title = winner.label;
  $("drawer-probability").textContent = photo.unanswered ? "" : percent(winner.probability);
  $("drawer-notes").replaceChildren(...notes());
  showCorrection();
  showDecided();
  showLogits();
}

function notes() {
  const lines = [];
  if (photo.no_match) lines.push(`This photo does not resemble any example photo. The closest guess is ${photo.winner.label}.`);
  if (photo.group) lines.push(`The ${photo.group.level} is ${photo.group.label}, ${percent(photo.group.probability)}.`);
  const others = photo.given?.slice(1).filter(({ gives }) => gives > 0) ?? [];
  if (others.length && photo.winner === photo.best) {
    const [itself] = photo.given;
    const changed = itself.label === photo.winner.label ? "" : `, which alone would be ${itself.label},`;
    const names = others.map(({ input, label }) => `${nameOf(input)} (${label})`).join(", ");
    lines.push(`This photo${changed} gives ${percent(itself.gives)} of the probability. Similar photos give the rest: ${names}.`);
  }
  if (photo.taught) lines.push(`You added this photo as an example of ${photo.taught}.`);
  if (photo.judgedByOthers) lines.push("This photo is one of the examples, so only the other examples count here.");
  return lines.map((text) => el("p", {}, text));
}

function showCorrection() {
  const can = state.info.changes;
  const settled = !can || photo.unanswered || (photo.taught !== null && !photo.inFolder);
  $("drawer-wrong").hidden = settled;
  $("drawer-right").hidden = settled || photo.taught !== null || photo.judgedByOthers; // it is an example already
  $("drawer-wrong").setAttribute("aria-expanded", String(wrong === photo));
  $("drawer-correction").hidden = !can || (wrong !== photo && !photo.unanswered);
  $("drawer-which").textContent = photo.unanswered ? "What is it?" : "Which class is right?";
  $("drawer-refused").hidden = can;
  $("drawer-chips").replaceChildren(...chips(can ? photo.choices : [], give));
}

function showDecided() {
  const { supporting, opposing } = photo.shown;
  const most = Math.max(1e-300, ...[...supporting, ...(opposing ? [opposing] : [])].map(strength));
  const [first, ...others] = supporting.map((key) => decidedRow(key, most));
  $("decided").replaceChildren(first ?? "");
  $("decided-others").replaceChildren(...others);
  $("opposed").replaceChildren(...(opposing ? [decidedRow(opposing, most)] : []));
  $("opposed-title").hidden = !opposing;
  $("decided-more").hidden = !others.length;
  $("decided-more").firstElementChild.textContent = plural(others.length, "more example");
}

/** Return how much an example changed the answer, which is its contribution to the winner, or else to the runner-up. */
const strength = ({ gives: [contribution], weight }) => Math.abs(contribution) || weight;

function decidedRow(key, most) {
  const { key_id: keyId, affinity, gives: [contribution] } = key;
  const moved = el("i", { class: contribution > 0 ? "for" : "against", aria: { hidden: "true" } });
  moved.style.setProperty("--p", strength(key) / most);
  const label = cut(contribution ? photo.shown.rows[0].label : key.label);
  const points = contribution ? `${Number(Math.abs(contribution).toPrecision(2))} points` : "speaks";
  const image = picture(api.pictureOf(state.info.name, keyId), 240, nameOf(key.source));
  const name = el("span", { class: "name", title: key.label }, cut(key.label));
  const gives = el("span", { class: "gives", data: { value: contribution } }, `${points} ${contribution < 0 ? "against" : "for"} ${label}`);
  const title = `${key.source}, similarity ${affinity.toFixed(2)}`;
  return el("li", { data: { keyId, affinity, weight: key.weight }, title }, image, name, moved, gives);
}

function showLogits() {
  const { values, log_offset: offset, gamma } = state.info;
  const sum = `Σ exp(−β (1 − similarity))${values === "one-hot" ? "" : " V"}`;
  const cache = offset ? `α log(1 + ${sum} / ${short(offset)})` : `α ${sum}`;
  $("formula").textContent = gamma ? `${cache} + α γ B` : cache;
  const cell = (name, value, text) => el("td", { class: name, data: { value } }, text);
  const row = ({ label, probability: p, text, cache }) => {
    const cells = [cell("p", p, percent(p)), cell("text-part", text, short(text)), cell("cache-part", cache, short(cache))];
    return el("tr", { data: { label } }, el("th", { scope: "row" }, label), ...cells);
  };
  $("logits").replaceChildren(...photo.shown.rows.map(row));
}
