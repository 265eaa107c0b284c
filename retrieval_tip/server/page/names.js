// The class that a person means by a typed text.

export const NONE = "none of these"; // the class of photos that belong to no other class

/** Names that are equal here differ only in case, `_`, `-` or spaces, as in data/sources.py. */
const plain = (name) => spaced(name).toLowerCase();
const spaced = (name) => name.replace(/(?!^-\d)[\s_-]+/g, " ").trim();
const digits = (name) => name.replace(/\D+/g, " ").trim();

/** Return the class that a text means as { label }, or a class that it resembles as { near }.
 *
 *  A text means the class that has this name, or the only class whose name begins with it. Capital letters that this
 *  class does not have may be meant, so it only resembles the text. If there is no such class, the text is a new label,
 *  unless it resembles a class in all but a few letters. */
export function meant(text, classes) {
  if (classes.includes(text) || !plain(text)) return { label: text };
  if (text.toLowerCase() === NONE) return { label: NONE };
  const starts = classes.filter((name) => plain(name).startsWith(plain(text)));
  const found = starts.find((name) => plain(name) === plain(text)) ?? (starts.length === 1 ? starts[0] : null);
  if (found) return text === text.toLowerCase() || spaced(found).startsWith(spaced(text)) ? { label: found } : { near: found };
  const near = classes.filter((name) => digits(name) === digits(text)); // "type 2" is not a misspelt "type 1"
  const apart = near.map((name) => distance(plain(text), plain(name)) / typos(Math.max(text.length, name.length)));
  const least = Math.min(...apart);
  return least <= 1 ? { near: near[apart.indexOf(least)] } : { label: text };
}

/** Return the classes that contain a text, in alphabetical order. Those that begin with it come first. */
export function matching(text, classes) {
  const wanted = plain(text);
  const found = classes.filter((name) => plain(name).includes(wanted)).sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  const begins = (name) => plain(name).startsWith(wanted);
  return [...found.filter(begins), ...found.filter((name) => !begins(name))];
}

const typos = (length) => (length < 4 ? 0 : length < 8 ? 1 : 2);

/** Return the number of letters to insert, delete, replace or swap with the next letter. */
function distance(a, b) {
  let [before, last] = [[], [...Array(b.length + 1).keys()]];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      row[j] = Math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] !== b[j - 1]));
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1);
    }
    [before, last] = [last, row];
  }
  return last[b.length];
}
