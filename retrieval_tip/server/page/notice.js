// A line at the bottom of the page that describes the last change and can offer to undo it.

import { $, el } from "./dom.js";

/** Show a notice, and return a function that changes its text. `undo` returns the text of the next notice, or false if
 *  nothing was undone. */
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
  const close = el("button", { type: "button", class: "quiet", aria: { label: "Dismiss" }, onclick: () => notice("") }, "×");
  $("notice").hidden = !text;
  $("notice").replaceChildren(line, ...(button ? [" ", button] : []), " ", close);
  return (other) => (line.textContent = other);
}
