// Functions that list dropped or selected files, and the folder of each file.

/** Return the files of an entry as { file, folder }, excluding hidden files. */
async function filesIn(entry, folder) {
  if (entry.name.startsWith(".")) return [];
  if (entry.isFile) return [{ file: await new Promise((resolve, reject) => entry.file(resolve, reject)), folder }];
  const reader = entry.createReader();
  const hundred = () => new Promise((resolve, reject) => reader.readEntries(resolve, reject));
  const found = [];
  for (let some = await hundred(); some.length; some = await hundred()) found.push(...some);
  const parts = await Promise.all(found.map((one) => filesIn(one, entry.name)));
  return parts.flat();
}

/** Return all files that were dropped or pasted. Call this function while the event is handled, because the entries are
 *  no longer available afterwards. */
export async function gather(transfer) {
  const entries = [...(transfer.items ?? [])].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry?.());
  const plain = [...transfer.files];
  if (!entries.some((entry) => entry?.isDirectory)) return plain.map((file) => ({ file, folder: null }));
  const parts = await Promise.all(entries.map((entry, i) => (entry ? filesIn(entry, null) : [{ file: plain[i], folder: null }])));
  return parts.flat();
}

/** Return the files of a selected folder. */
export const inFolders = (files) =>
  files
    .filter((file) => !file.name.startsWith("."))
    .map((file) => ({ file, folder: file.webkitRelativePath.split("/").at(-2) ?? null }));
