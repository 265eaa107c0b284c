// The open photo, with its answer, the examples for and against this answer, and the calculation.

import * as api from "./api.js";
import { $, chips, cut, el, isBare, named, nameOf, percent, picture, short } from "./dom.js";
import { settings } from "./settings.js";
import { state } from "./state.js";

let photo = null;
let on = null; // functions of the page, which setUp describes
let wrong = null; // the photo whose answer is wrong

export const openPhoto = () => photo;

/** `given.teach(photos, label)` adds photos as examples, `given.close()` closes the drawer, and `given.step(by)` opens
 *  another photo. */
export const setUp = (given) => (on = given);

const clicks = {
  "drawer-close": () => on.close(),
  "drawer-previous": () => on.step(-1),
  "drawer-next": () => on.step(1),
  "drawer-right": () => give(photo.winner.label),
  "drawer-wrong": correct,
  "decided-more": () => showMore(!$("decided").classList.contains("all")),
};
for (const [id, onclick] of Object.entries(clicks)) $(id).addEventListener("click", onclick);
$("drawer").addEventListener("keydown", (event) => {
  if (event.key === "Escape") on.close();
  else if (event.target.closest("input, select, summary") || !isBare(event)) return;
  else if (event.key === "ArrowLeft" || event.key === "ArrowRight") on.step(event.key === "ArrowLeft" ? -1 : 1);
  else if (/^[123]$/.test(event.key)) give(photo?.choices[Number(event.key) - 1]);
  else if (event.key === "w") correct();
  else if (event.key === "Enter" && !event.target.closest("button") && !$("drawer-right").hidden) give(photo.winner.label);
  else return;
  event.preventDefault();
});
for (const type of ["touchstart", "touchend"]) $("drawer").addEventListener(type, swipe, { passive: true });
named($("drawer-form"), give);
$("drawer-label").addEventListener("input", newClass);

const SWIPED = 64; // px that a finger moves to the side to confirm or refuse the answer
let touched = null; // where the finger was put down

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
  $("drawer-label").focus();
}

/** Add the photo as an example of a class. */
function give(label) {
  if (label && state.info.changes) on.teach([photo], label);
}

function newClass() {
  const label = $("drawer-label").value.trim();
  $("drawer-new").textContent =
    label && !state.labels.includes(label) ? `This creates the new class ${label}, with this photo as its first example.` : "";
}

/** Show the settings with the calculation of the open photo, or else on their own screen. */
export const placeSettings = () => $(photo && location.hash !== "#settings" ? "howto" : "settings-home").append($("settings-fold"));

export function open(which) {
  const another = which !== photo;
  photo = which;
  $("drawer").hidden = false;
  document.body.classList.add("drawn");
  placeSettings();
  if (another) {
    $("drawer-label").value = "";
    newClass();
    $("drawer-picture").replaceChildren(photo.image(1024, `Your photo ${photo.name}`));
    $("drawer").scrollTop = 0;
    showMore(false);
  }
  show();
}

function showMore(all) {
  $("decided").classList.toggle("all", all);
  $("decided-more").setAttribute("aria-expanded", String(all));
}

export function close() {
  photo = null;
  $("drawer").hidden = true;
  document.body.classList.remove("drawn");
  placeSettings();
}

export function show() {
  if (!photo) return;
  const drawer = $("drawer");
  const { shown, winner } = photo;
  drawer.setAttribute("aria-busy", String(photo.busy || shown?.name !== settings.name));
  $("drawer-file").textContent = cut(photo.name, 40);
  $("drawer-file").title = photo.name;
  $("drawer-state").textContent = photo.problem?.message ?? (photo.busy ? "Classifying…" : "");
  $("drawer-answer").hidden = !shown;
  if (!shown) {
    $("drawer-title").textContent = cut(photo.name, 40);
    $("drawer-probability").textContent = "";
    return;
  }
  $("drawer-title").textContent = photo.no_match ? "No match" : cut(winner.label, 40);
  $("drawer-title").title = winner.label;
  $("drawer-probability").textContent = photo.no_match ? "" : percent(winner.probability);
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
    const changed = itself.label === photo.winner.label ? "" : `, which alone would be ${itself.label}`;
    const names = others.map(({ input, label }) => `${nameOf(input)} (${label})`).join(", ");
    lines.push(`This photo${changed}, gives ${percent(itself.gives)} of the probability. Similar photos give the rest: ${names}.`);
  }
  if (photo.taught) lines.push(`You added this photo as an example of ${photo.taught}.`);
  if (photo.judgedByOthers) lines.push("This photo is one of the examples, so only the other examples count here.");
  const { before, shown } = photo;
  const same = before?.rows[0].label === shown.rows[0].label;
  if (before && (!same || percent(before.rows[0].probability) !== percent(shown.rows[0].probability)))
    lines.push(`Before the last change: ${same ? "" : `${before.rows[0].label} `}${percent(before.rows[0].probability)}.`);
  return lines.map((text) => el("p", {}, text));
}

function showCorrection() {
  const can = state.info.changes;
  const settled = !can || photo.no_match || (photo.taught !== null && !photo.inFolder);
  $("drawer-wrong").hidden = settled;
  $("drawer-right").hidden = settled || photo.taught !== null || photo.judgedByOthers; // it is an example already
  $("drawer-wrong").setAttribute("aria-expanded", String(wrong === photo));
  $("drawer-correction").hidden = !can || (wrong !== photo && !photo.no_match);
  $("drawer-which").textContent = photo.no_match ? "What is it?" : "Which class is right?";
  $("drawer-refused").hidden = can;
  $("drawer-chips").replaceChildren(...chips(can ? photo.choices : [], give));
}

function showDecided() {
  const { supporting, opposing } = photo.shown;
  const most = Math.max(1e-300, ...[...supporting, ...(opposing ? [opposing] : [])].map(strength));
  $("decided").replaceChildren(...supporting.map((key) => decidedRow(key, most)));
  $("opposed").replaceChildren(...(opposing ? [decidedRow(opposing, most)] : []));
  $("opposed-title").hidden = !opposing;
  $("decided-more").hidden = supporting.length < 2;
  $("decided-more").textContent = `${supporting.length - 1} more ${supporting.length === 2 ? "example" : "examples"}`;
}

/** Return how much an example changed the answer, which is its contribution to the winner, or else to the runner-up. */
const strength = ({ gives: [contribution], weight }) => Math.abs(contribution) || weight;

function decidedRow(key, most) {
  const { key_id: keyId, affinity, gives: [contribution] } = key;
  const moved = el("i", { class: contribution > 0 ? "for" : "against", aria: { hidden: "true" } });
  moved.style.setProperty("--p", strength(key) / most);
  const label = cut(contribution ? photo.shown.rows[0].label : key.label);
  const points = contribution ? `${short(Math.abs(contribution))} points` : "speaks";
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

settings.addEventListener("change", show);
