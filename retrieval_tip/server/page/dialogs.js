// Dialogs that ask for a name or for a confirmation.

import { $ } from "./dom.js";

const pending = new WeakMap();

/** Open a dialog, and return its return value when it is closed. If it was dismissed, the value is "". */
export function ask(dialog) {
  pending.get(dialog)?.(""); // it was dismissed, and opened again before its close event
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => dialog.open || end(dialog.returnValue);
    const end = (value) => {
      dialog.removeEventListener("close", closed);
      pending.delete(dialog);
      resolve(value);
    };
    pending.set(dialog, end);
    dialog.addEventListener("close", closed);
  });
}

/** Ask for a name, and return it, or "" if the dialog is dismissed. `says(name)` returns the text of the button and a hint
 *  while the name is typed. */
export async function askName(title, name, says) {
  const input = $("rename-label");
  $("rename-title").textContent = title;
  input.value = name;
  input.oninput = () => {
    const [button, hint = ""] = says(input.value.trim());
    $("rename-ok").textContent = button;
    $("rename-merge").textContent = hint;
  };
  input.oninput();
  const answer = ask($("rename-dialog"));
  input.select();
  return (await answer) === "ok" ? input.value.trim() : "";
}

/** Ask for a confirmation. Only what cannot be undone is a `danger`. */
export async function confirmed(title, text, button, { shown = [], danger = false } = {}) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-shot").replaceChildren(...shown);
  $("confirm-ok").textContent = button;
  $("confirm-ok").className = danger ? "danger" : "primary";
  return (await ask($("confirm-dialog"))) === "ok";
}

$("rename-cancel").addEventListener("click", () => $("rename-dialog").close(""));
