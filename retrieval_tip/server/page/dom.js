// Elements. Names and sources come from anywhere: they become text nodes and attributes, never markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties (`data` and `aria` are maps, `class` is the class) and children, strings being text. */
export function el(tag, { data = {}, aria = {}, class: names, role, ...properties } = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  if (names) element.className = names;
  if (role) element.setAttribute("role", role);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Replace the children of a list. The focus stays on its button, if one of the same name is there again. */
export function refill(list, children) {
  const named = (button) => button.ariaLabel ?? button.title;
  const focused = list.contains(document.activeElement) ? named(document.activeElement) : null;
  list.replaceChildren(...children);
  if (focused) [...list.querySelectorAll("button")].find((button) => named(button) === focused)?.focus({ preventScroll: true });
}

/** Something to read aloud, once it has been still for a moment: moving a slider says the last answer, not all. */
let saying;
export function say(text) {
  clearTimeout(saying);
  saying = setTimeout(() => ($("live").textContent = text), 400);
}

/** Calls at most once in so many milliseconds of quiet, with the last arguments. */
export function debounced(milliseconds, call) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...given), milliseconds);
  };
}

export function percent(p) {
  if (p > 0 && p < 0.0005) return "<0.1 %";
  if (p < 1 && p > 0.9995) return ">99.9 %";
  return `${(100 * p).toFixed(1)} %`;
}

/** A number for reading; its full precision goes beside it, in data-value. */
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const digits = size >= 1000 ? 0 : size >= 10 ? 2 : 3;
  const text = size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(1) : value.toFixed(digits);
  return text.replaceAll("-", "−");
}

export const plural = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** The last part of a path, or its last two. */
export const nameOf = (source, parts = 1) => String(source).split(/[\\/]/).filter(Boolean).slice(-parts).join("/");

/** A picture of a key, or a quiet placeholder where the server has none. Decorative: text beside it says what it is. */
export function picture(url, size, label) {
  const none = () => el("span", { class: "picture none", title: "no picture on the server" }, "no picture");
  if (!url) return none();
  const image = el("img", {
    class: "picture",
    loading: "lazy",
    decoding: "async",
    alt: label,
    src: `${url}?size=${size}`,
  });
  image.addEventListener("error", () => image.replaceWith(none()), { once: true });
  return image;
}

/** What went wrong, with a way to try again. */
export function failure(error, again) {
  const button = again && el("button", { type: "button" }, "Try again");
  button?.addEventListener("click", again);
  return el("span", { class: "failure" }, el("span", { role: "alert" }, error.message), " ", button);
}
