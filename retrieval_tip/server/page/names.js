// The class that a person means by a typed text.

export const NONE = "none of these"; // the class of photos that belong to no other class
const SHORT = 4; // number of letters; shorter names are not misspelt

/** Names that are equal here differ only in case, `_`, `-` or spaces, as in data/sources.py. */
const plain = (name) => spaced(name).toLowerCase();
const spaced = (name) => name.replace(/(?!^-\d)[\s_-]+/g, " ").trim();
const digits = (name) => name.replace(/\D+/g, " ").trim();

/** Return the class that a text means as { label }, or a class that it resembles as { near }.
 *
 *  A text means the class that has this name, or the only class whose name begins with it. Capital letters that this
 *  class does not have may be meant, so it only resembles the text. If there is no such class, the text is a new label,
 *  unless it resembles a class in all but one letter. */
export function meant(text, classes) {
  if (classes.includes(text) || !plain(text)) return { label: text };
  if (text.toLowerCase() === NONE) return { label: NONE };
  const starts = classes.filter((name) => plain(name).startsWith(plain(text)));
  const found = starts.find((name) => plain(name) === plain(text)) ?? (starts.length === 1 ? starts[0] : null);
  if (found) return text === text.toLowerCase() || spaced(found).startsWith(spaced(text)) ? { label: found } : { near: found };
  const variantsOf = variants(plain(text));
  const isNear = (name) => Math.max(text.length, name.length) >= SHORT && !variants(plain(name)).isDisjointFrom(variantsOf);
  const near = classes.find((name) => digits(name) === digits(text) && isNear(name)); // "type 2" is not a misspelt "type 1"
  return near ? { near } : { label: text };
}

/** Return the classes that contain a text, in alphabetical order. Those that begin with it come first. */
export function matching(text, classes) {
  const wanted = plain(text);
  const found = classes.filter((name) => plain(name).includes(wanted)).sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  const begins = (name) => plain(name).startsWith(wanted);
  return [...found.filter(begins), ...found.filter((name) => !begins(name))];
}

/** Return a text without each of its letters. Texts share one if they differ in a letter, or by a swap of neighbours. */
const variants = (text) => new Set([text, ...[...text].map((_, i) => text.slice(0, i) + text.slice(i + 1))]);
