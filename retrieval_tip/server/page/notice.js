// A line at the bottom of the page that says what happened, with Undo.

import { $, el } from "./dom.js";

/** Show a notice. `undo` returns the text that follows it, or false if nothing was undone.
 *  Returns a function that changes the text of the notice. */
export function notice(text, undo) {
  const line = el("span", {}, text);
  const button = undo && el("button", { type: "button" }, "Undo");
  button?.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const undone = await undo();
      if (undone) notice(undone);
      else button.disabled = false;
    } catch (error) {
      notice(error.message);
    }
  });
  const close = el("button", { type: "button", class: "quiet", aria: { label: "Dismiss" } }, "×");
  close.addEventListener("click", () => notice(""));
  $("notice").hidden = !text;
  $("notice").replaceChildren(line, ...(button ? [" ", button] : []), " ", close);
  return (other) => (line.textContent = other);
}
