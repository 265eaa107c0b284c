// Dialogs that ask for a name or for a confirmation. They are removed from the page when they are closed.

import { $, button, el } from "./dom.js";
import { meant } from "./names.js";

/** Open a dialog, and return the value of the button that closes it. If it is dismissed, the value is "". */
export function ask(name, title, content, buttons) {
  const heading = el("h2", { id: `${name}-title` }, title);
  const form = el("form", { method: "dialog" }, heading, ...content, el("p", { class: "dialog-buttons" }, ...buttons));
  const dialog = el("dialog", { id: `${name}-dialog`, aria: { labelledby: heading.id } }, form);
  $(dialog.id)?.close(""); // asking again dismisses the same question
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => (dialog.remove(), resolve(dialog.returnValue));
  });
}

/** Open a dialog that can be cancelled. Return whether it is not. */
export async function agreed(name, title, content, text, kind = "primary") {
  const cancel = button("Cancel", ({ target }) => target.closest("dialog").close(""), { id: `${name}-cancel` });
  const ok = el("button", { value: "ok", class: kind, id: `${name}-ok` }, text);
  return (await ask(name, title, content, [cancel, ok])) === "ok";
}

/** Ask for a name, and return it, or "" if the dialog is dismissed. `hint(name)` returns a hint while the name is typed. */
export async function askName(title, name, text, hint) {
  const field = el("input", { id: "rename-label", autocomplete: "off", maxLength: 1024, required: true, value: name });
  const hinted = el("p", { class: "hint", id: "rename-merge", role: "status" });
  field.oninput = () => (hinted.textContent = hint(field.value.trim()));
  field.oninput();
  const answer = agreed("rename", title, [el("label", {}, "New name ", field), hinted], text);
  field.select();
  return (await answer) && field.value.trim();
}

/** Return the class that a typed text means. If it resembles a class, ask; if this is dismissed, return undefined. */
export async function classMeant(text, classes) {
  const { label, near } = meant(text, classes);
  if (!near) return label;
  const onkeydown = (event) => {
    if (event.key !== "Enter" || !(event.shiftKey || event.repeat)) return;
    event.preventDefault();
    if (!event.repeat) event.target.closest("dialog").close("new");
  };
  const choice = (value, name, keys, properties) => {
    const content = [el("span", {}, name), " ", el("kbd", {}, keys)];
    return el("button", { value, onkeydown, aria: { keyshortcuts: keys }, ...properties }, ...content);
  };
  const other = choice("new", `New class “${text}”`, "Shift+Enter", {});
  const known = choice("near", near, "Enter", { class: "primary", autofocus: true });
  return { new: text, near }[await ask("alike", `New class “${text}”, or ${near}?`, [], [other, known])];
}

/** Ask for a confirmation. Only what cannot be undone is a `danger`. */
export const confirmed = (title, text, action, { shown = [], kind } = {}) =>
  agreed("confirm", title, [el("div", { id: "confirm-shot" }, ...shown), el("p", {}, text)], action, kind);
