// The first screen, which shows the classes of the classifier, its accuracy, and some example photos to try.

import * as api from "./api.js";
import { addFiles } from "./classify.js";
import { $, button, count, cut, el, picture, plural } from "./dom.js";
import { state } from "./state.js";

const CLASSES = 60; // number of classes to show
const SAMPLES = 6;

async function show() {
  const { info } = state;
  const examples = plural(info.n_keys, "example photo");
  $("knows").textContent = `“${info.name}” recognises ${plural(info.counts.length, "class", "classes")}, learned from ${examples}`;
  const more = info.counts.length - CLASSES;
  $("known-more").textContent = more > 0 ? `and ${count(more)} more` : "";
  const list = (shown) => {
    const images = new Map(shown.map(({ class_id: id, image }) => [id, image]));
    const items = state.labels.slice(0, CLASSES).map((label, id) =>
      el("li", {}, picture(images.get(id), 160, ""), el("span", { class: "name", title: label }, cut(label)), el("span", { class: "hint" }, plural(info.counts[id], "photo"))),
    );
    $("known").replaceChildren(...items);
  };
  list([]);
  $("samples").hidden = true;
  const exemplars = await state.exemplars();
  if (info !== state.info) return;
  list(exemplars);
  const pictured = exemplars.filter(({ image }) => image);
  const step = Math.max(1, Math.floor(pictured.length / SAMPLES));
  samples(info.images ? pictured.filter((_, i) => i % step === 0).slice(0, SAMPLES) : []);
}

/** Show example photos that the user can click. Each is classified with all other examples. */
function samples(shown) {
  $("samples").hidden = !shown.length;
  $("samples-list").replaceChildren(
    ...shown.map(({ key_id: id, class_id: classId, image }) => {
      const label = `Try a photo of ${state.labels[classId]}`;
      const onclick = async () => {
        const response = await fetch(`${api.pictureOf(state.info.name, id)}?size=1024`);
        if (response.ok) addFiles([new File([await response.blob()], `${state.labels[classId]} ${id}.jpg`, { type: "image/jpeg" })], [id]);
      };
      return el("li", {}, button([picture(image, 240, "")], onclick, { aria: { label } }));
    }),
  );
}

for (const event of ["index", "version"]) state.addEventListener(event, show);
