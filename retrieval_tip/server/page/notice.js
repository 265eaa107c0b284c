// A line at the foot of the page: what was done, and a way to undo it.

import { $, el } from "./dom.js";

/** A line at the foot of the page; `undo` says what it did, or false where it was not done.
 *  Returns what changes its text, as long as it is there. */
export function notice(text, undo) {
  const line = el("span", {}, text);
  const button = undo && el("button", { type: "button" }, "Undo");
  button?.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const said = await undo();
      if (said) notice(said);
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
