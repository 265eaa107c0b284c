// A zip file of the photos on the page. The photos are stored without compression, because they are compressed already.
// Only their checksums are computed here, so that the browser does not have to hold them in memory.

const MOST = 2 ** 32 - 1; // bytes, the limit of the format without extensions
const MOST_FILES = 2 ** 16 - 1;
const HEAD = 30; // bytes of the header of a file
const UTF8 = 0x0800; // flag of names in UTF-8

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

const UNSAFE = /[\x00-\x1f\x7f/\\:*?"<>|]|%(?=[0-9A-Fa-f]{2})|^[. ]|[. ]$/g;
const RESERVED = /^(con|prn|aux|nul|com\d|lpt\d)(\..*)?$/is; // on Windows
const escaped = (character) => `%${character.charCodeAt(0).toString(16).toUpperCase().padStart(2, "0")}`;
const escapedFirst = (name) => escaped(name) + name.slice(1);

/** Return a name that every file system accepts, as `retrieval-tip sort` does. Different names stay different. */
export function safe(name) {
  const text = name.replace(UNSAFE, escaped) || "%00";
  return RESERVED.test(text) ? escapedFirst(text) : text;
}

/** Return the name of the folder of a class, which differs from the folders of photos without an answer. */
export const classFolder = (label) => (/^(no match|not sure)$/i.test(label) ? escapedFirst(label) : safe(label));

async function checksum(file) {
  let crc = ~0;
  const reader = file.stream().getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read())
    for (const byte of part.value) crc = (crc >>> 8) ^ TABLE[(crc ^ byte) & 255];
  return ~crc >>> 0;
}

/** Return numbers of two bytes each, of which the lowest comes first. `long` splits numbers of four bytes. */
const bytes = (...numbers) => Uint16Array.from(numbers);
const long = (number) => [number & 0xffff, number >>> 16];

const time = (date) => [
  (date.getHours() << 11) | (date.getMinutes() << 5) | (date.getSeconds() >> 1),
  (Math.max(0, date.getFullYear() - 1980) << 9) | ((date.getMonth() + 1) << 5) | date.getDate(),
];

/** Return a zip file of [path, file] pairs as a blob. `progress` is called with the number of files that are done. */
export async function zip(pairs, progress = () => {}) {
  const total = pairs.reduce((sum, [, file]) => sum + file.size, 0);
  if (total > 0.99 * MOST || pairs.length > MOST_FILES) throw new Error("These photos do not fit into one zip file. Use “retrieval-tip sort” instead.");
  const parts = [];
  const entries = [];
  let at = 0;
  for (const [done, [path, file]] of pairs.entries()) {
    progress(done);
    const name = new TextEncoder().encode(path);
    const sizes = [...long(await checksum(file)), ...long(file.size), ...long(file.size), name.length, 0];
    const facts = [20, UTF8, 0, ...time(new Date(file.lastModified)), ...sizes];
    parts.push(bytes(...long(0x04034b50), ...facts), name, file);
    entries.push(bytes(...long(0x02014b50), 20, ...facts, 0, 0, 0, 0, 0, ...long(at)), name);
    at += HEAD + name.length + file.size;
  }
  const directory = new Blob(entries);
  const end = bytes(...long(0x06054b50), 0, 0, pairs.length, pairs.length, ...long(directory.size), ...long(at), 0);
  return new Blob([...parts, directory, end], { type: "application/zip" });
}
