// Dropped or chosen files, each with its folder.

/** The files of an entry, as { file, folder }, without hidden ones. */
async function filesIn(entry, folder) {
  if (entry.name.startsWith(".")) return [];
  if (entry.isFile) return [{ file: await new Promise((resolve, reject) => entry.file(resolve, reject)), folder }];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // a hundred at a time
    if (!some.length) break;
    found.push(...some);
  }
  const parts = await Promise.all(found.map((one) => filesIn(one, entry.name)));
  return parts.flat();
}

/** All files of a drop or a paste. Call it while the event is handled: the entries vanish afterwards. */
export async function gather(transfer) {
  const entries = [...(transfer.items ?? [])].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry?.());
  const plain = [...transfer.files];
  if (!entries.some((entry) => entry?.isDirectory)) return plain.map((file) => ({ file, folder: null }));
  const parts = await Promise.all(entries.map((entry, i) => (entry ? filesIn(entry, null) : [{ file: plain[i], folder: null }])));
  return parts.flat();
}

/** The files of a folder input. */
export const chosen = (input) =>
  [...input.files]
    .filter((file) => !file.name.startsWith("."))
    .map((file) => ({ file, folder: file.webkitRelativePath.split("/").at(-2) ?? null }));
