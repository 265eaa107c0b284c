// A line at the bottom of the screen that describes the last change there and can offer to undo it.

import { $, button, cross, cut, el } from "./dom.js";
import { state } from "./state.js";

const LONGEST = 40; // number of letters of a word that is shown in full
const screen = () => location.hash || "#classify";
let home = ""; // the screen that the notice belongs to

/** Show a notice, and return a function that changes its text. `undo` returns the text of the next notice, or false if
 *  nothing was undone. */
export function notice(text, undo) {
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
  $("notice").replaceChildren(line, ...(undo ? [" ", button("Undo", undoing)] : []), " ", cross("Dismiss", () => notice("")));
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
