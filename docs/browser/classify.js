// Classify a photo in the browser with an index written by `retrieval-tip index export --onnx`.
//
// Put index.html and things.onnx beside this file. Copy three files of dist/ in the npm package onnxruntime-web to ort/:
// ort.wasm.min.mjs, ort-wasm-simd-threaded.mjs and ort-wasm-simd-threaded.wasm.
import * as ort from "./ort/ort.wasm.min.mjs";

const MODEL = "things.onnx";
const SHOWN = 5;
ort.env.wasm.numThreads = 1; // using more threads requires the headers COOP and COEP

// --- the model and its metadata

/** Open a session, and return it with the labels and the preprocessing of the index. */
export async function open(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  const model = new Uint8Array(await answer.arrayBuffer());
  const { labels, preprocess } = metadata(model);
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  return { session, labels: JSON.parse(labels), preprocess: JSON.parse(preprocess) };
}

/** Return the metadata of an ONNX file, which onnxruntime-web does not expose. It is stored as pairs in field 14. */
function metadata(model) {
  const text = new TextDecoder();
  const entries = [...fields(model)].filter(([number]) => number === 14);
  return Object.fromEntries(entries.map(([, entry]) => [...fields(entry)].map(([, value]) => text.decode(value))));
}

/** Yield the number and the bytes of each length-delimited field of a protobuf message. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1, byte = 128; byte > 127; scale *= 128) {
      byte = bytes[at++];
      value += (byte & 127) * scale;
    }
    return value;
  };
  while (at < bytes.length) {
    const key = varint();
    if (key % 8 === 0) varint();
    else if (key % 8 === 2) {
      const length = varint();
      yield [Math.floor(key / 8), bytes.subarray(at, at + length)];
      at += length;
    } else throw new Error("this is not an ONNX file");
  }
}

// --- the answer

/** Return the logits and probabilities of an image, given as a file or a blob, and whether it resembles no shot. */
export async function classify({ session, preprocess }, file) {
  const pixels = view(await decoded(file), preprocess);
  const [height, width] = preprocess.size;
  const found = await session.run({ pixels: new ort.Tensor("float32", pixels, [1, 3, height, width]) });
  const no_match = Boolean(found.no_match?.data[0]); // absent if the index is not fitted
  return { logits: found.logits.data, probabilities: found.probabilities.data, no_match };
}

/** Return the RGBA pixels of an image, rotated upright, on a white background, with its colours unconverted. */
async function decoded(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

/** Resize an image and crop its centre, and return pixels of shape [3, height, width] with values from 0 to 255. */
function view(image, { size: [height, width], shorter_side: side, resize_mode: mode, interpolation }) {
  if (!side || !(interpolation in FILTERS)) throw new Error("the model does not say how photos must be prepared");
  const longer = Math.trunc((side * Math.max(image.width, image.height)) / Math.min(image.width, image.height));
  const upright = image.width <= image.height;
  const [wide, high] = mode === "squash" ? [width, height] : upright ? [side, longer] : [longer, side];
  const rows = resized(image.data, image.width, image.height, wide, interpolation); // [wide, height of the image]
  const data = resized(rows, image.height, wide, high, interpolation); // [high, wide]
  const [left, top] = [half(wide - width), half(high - height)];
  const pixels = new Float32Array(3 * height * width);
  for (let channel = 0; channel < 3; channel++)
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++)
        pixels[(channel * height + y) * width + x] = data[4 * ((top + y) * wide + left + x) + channel];
  return pixels;
}

/** Halve a number, rounding to even like Python. */
function half(number) {
  const low = Math.floor(number / 2);
  return number % 2 && low % 2 ? low + 1 : low;
}

const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - x)],
  bicubic: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0)],
};

/**
 * Resize rows of RGBA pixels to another width, and transpose them: data of shape [lines, from] becomes [to, lines].
 *
 * The result is the same as in Pillow, so that the model sees the pixels it was fitted with. Each new pixel is the
 * average of the area that it covers, which a canvas does not guarantee. Weights have 22 bits, and each pass rounds
 * its results to bytes.
 */
function resized(data, from, lines, to, interpolation) {
  const [reach, weight] = FILTERS[interpolation];
  const scale = from / to, stretch = Math.max(1, scale), support = reach * stretch;
  const found = new Uint8ClampedArray(4 * to * lines);
  for (let x = 0; x < to; x++) {
    const centre = (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(from, Math.trunc(centre + support + 0.5));
    const raw = Array.from({ length: last - first }, (_, i) => weight(Math.abs((first + i - centre + 0.5) / stretch)));
    const sum = raw.reduce((a, b) => a + b);
    const weights = raw.map((value) => Math.round((value / sum) * (1 << 22)));
    for (let line = 0; line < lines; line++)
      for (let channel = 0; channel < 3; channel++) {
        let total = 1 << 21;
        for (let i = 0; i < weights.length; i++) total += weights[i] * data[4 * (line * from + first + i) + channel];
        found[4 * (x * lines + line) + channel] = total >> 22;
      }
  }
  return found;
}

// --- the page

const [input, status, picture, list] = ["input", "[role=status]", "img", "ol"].map((name) => document.querySelector(name));
const opened = open(MODEL);

opened.then(
  ({ labels }) => {
    status.textContent = `Ready: ${labels.length} classes, such as ${labels.slice(0, SHOWN).join(", ")}.`;
    input.disabled = false;
  },
  (error) => (status.textContent = `Cannot load the model: ${error.message}`),
);

input.addEventListener("change", async () => {
  const [file] = input.files;
  if (!file) return;
  picture.src = URL.createObjectURL(file);
  picture.hidden = false;
  list.replaceChildren();
  try {
    const started = performance.now();
    const model = await opened;
    const { probabilities, no_match } = await classify(model, file);
    const ranked = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, SHOWN);
    for (const place of ranked) {
      const line = document.createElement("li");
      line.textContent = `${model.labels[place]} ${(100 * probabilities[place]).toFixed(1)} %`;
      list.append(line);
    }
    const label = no_match ? "No match" : model.labels[ranked[0]];
    status.textContent = `${label}, after ${Math.round(performance.now() - started)} ms`;
  } catch (error) {
    status.textContent = `This photo cannot be read: ${error.message}`;
  }
});
