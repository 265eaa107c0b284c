// The first screen, which shows the accuracy of the classifier, and its classes, with example photos to try.

import { addFiles } from "./classify.js";
import { $, button, count, cut, el, picture, plural } from "./dom.js";
import { state } from "./state.js";

const CLASSES = 60; // number of classes to show

async function show() {
  const { info, labels } = state;
  const examples = plural(info.n_keys, "example photo");
  $("knows").textContent = `“${info.name}” recognises ${plural(labels.length, "class", "classes")}, learned from ${examples}`;
  const more = labels.length - CLASSES;
  $("known-more").textContent = more > 0 ? `and ${count(more)} more` : "";
  list([]);
  const exemplars = await state.exemplars();
  if (info === state.info) list(exemplars);
}

/** List the classes, with example photos that the user can click. Each is classified with all other examples. */
function list(exemplars) {
  const { info, labels } = state;
  const shown = new Map(exemplars.map((one) => [one.class_id, one]));
  $("known-hint").hidden = !info.images || !exemplars.some(({ image }) => image);
  const items = labels.slice(0, CLASSES).map((label, id) => {
    const { key_id: keyId, image } = shown.get(id) ?? {};
    const onclick = async () => {
      const response = await fetch(`${image}?size=1024`);
      if (response.ok) addFiles([new File([await response.blob()], `${label} ${keyId}.jpg`, { type: "image/jpeg" })], [keyId]);
    };
    const one = picture(image, 160, "");
    const shot = image && info.images ? button([one], onclick, { aria: { label: `Try a photo of ${label}` } }) : one;
    const texts = [el("span", { class: "name", title: label }, cut(label)), el("span", { class: "hint" }, plural(info.counts[id], "photo"))];
    return el("li", {}, shot, ...texts);
  });
  $("known").replaceChildren(...items);
}

for (const event of ["index", "version"]) state.addEventListener(event, show);
