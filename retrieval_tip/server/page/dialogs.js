// Dialogs and forms that ask for a name or a confirmation, and the notice that describes the last change and can undo it.

import { $, button, classField, cross, cut, el, named } from "./dom.js";
import { meant } from "./names.js";
import { state } from "./state.js";

const LONGEST = 40; // number of letters of a word that is shown in full
const screen = () => location.hash || "#classify";
let home = ""; // the screen that the notice belongs to

/** Open a dialog, and return the value of the button that closed it, or "" if it was dismissed. */
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

/** Ask for a name, and return it, or "" if the dialog is dismissed. `hint(name)` may return a hint while it is typed. */
export async function askName(title, name, text, hint = () => "") {
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
    if (event.key === "2") event.target.closest("dialog").close("near");
    else if (event.repeat) event.preventDefault(); // the key is held since it opened the dialog
  };
  const choice = (value, name, keys, properties) => {
    const content = [el("span", {}, name), " ", el("kbd", {}, keys)];
    return el("button", { value, onkeydown, aria: { keyshortcuts: keys }, ...properties }, ...content);
  };
  const typed = choice("new", `New class “${text}”`, "Enter", { class: "primary", autofocus: true });
  const known = choice("near", near, "2", {});
  return { new: text, near }[await ask("alike", `New class “${text}”, or ${near}?`, [], [known, typed])];
}

/** Fill a form with a field for a class and a button, and return the field. `call(label)` gets the class that is meant. */
export function classForm(form, text, classes, call) {
  const field = classField({ maxLength: 1024, placeholder: "any class…", aria: { label: "Class" } });
  form.append(field, el("button", {}, text));
  named(form, async (name) => {
    const label = await classMeant(name, classes());
    if (!label) return;
    field.value = "";
    call(label);
  });
  return field;
}

/** Show a notice, and return a function that changes its text. `undo` returns the next text, or false if it fails. */
export function notice(text, undo, ...more) {
  const line = el("span");
  const tell = (told) => Object.assign(line, { title: told, textContent: told.replace(/\S+/g, (word) => cut(word, LONGEST)) });
  tell(text);
  const undoing = async ({ target }) => {
    target.disabled = true;
    const undone = await reported(undo);
    if (undone) notice(undone);
    else target.disabled = false;
  };
  home = text && screen();
  $("notice").hidden = !text;
  $("notice").replaceChildren(line, ...(undo ? [" ", button("Undo", undoing)] : []), ...more, " ", cross("Dismiss", () => notice("")));
  return tell;
}

addEventListener("hashchange", () => ($("notice").hidden = screen() !== home));

/** Make a change, and return its result. If it fails, a notice shows the reason. */
export async function reported(change) {
  try {
    return await change();
  } catch (error) {
    notice(error.message);
  }
}

/** Show a notice that offers to restore version `to` while the index is at version `since`. Then `undone` is called. */
export const undoable = (text, to, since, undone = () => {}) =>
  notice(text, async () => (await state.rollback(to, since)) && (undone(), "Undone."));
