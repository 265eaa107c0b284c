// Functions for elements. Class and file names are untrusted, so they become text nodes and attributes, never markup.

export const $ = (id) => document.getElementById(id);

/** Return a new element that has these properties and children. `data` and `aria` are maps, and strings become text. */
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

/** Replace the children of a list. The focus stays on the button that has the same name. */
export function refill(list, children) {
  const named = (button) => button.ariaLabel ?? button.title;
  const focused = list.contains(document.activeElement) ? named(document.activeElement) : null;
  list.replaceChildren(...children);
  if (focused) [...list.querySelectorAll("button")].find((button) => named(button) === focused)?.focus({ preventScroll: true });
}

/** Announce a text to screen readers, unless another text follows within 400 ms. */
let saying;
export function say(text) {
  clearTimeout(saying);
  saying = setTimeout(() => ($("live").textContent = text), 400);
}

/** Return a function that waits until it has not been called for `milliseconds`, and then calls `call` with its last
 *  arguments. */
export function debounced(milliseconds, call) {
  let timer;
  return (...last) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...last), milliseconds);
  };
}

/** Whether the user prefers reduced motion, as `calm.matches`. */
export const calm = matchMedia("(prefers-reduced-motion: reduce)");

export const whole = (share) => Math.round(100 * share);

/** Format a share without decimals. A share that is not certain is never shown as 0 % or 100 %. */
export const percent = (share) => `${share < 0.01 ? "<1" : share > 0.99 ? ">99" : whole(share)}\u00a0%`;

/** Format a whole number with narrow spaces. */
export const count = (number) => number.toLocaleString("en").replaceAll(",", "\u202f");

/** Format a number with few digits. */
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const digits = size >= 1000 ? 0 : size >= 10 ? 2 : 3;
  const text = size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(1) : value.toFixed(digits);
  return text.replaceAll("-", "−");
}

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

/** Return the last `parts` parts of a path. */
export const nameOf = (source, parts = 1) => String(source).split(/[\\/]/).filter(Boolean).slice(-parts).join("/");

/** Return the image of an example, or a placeholder if the server does not have the image. */
export function picture(url, size, label) {
  const none = () => el("span", { class: "picture none", title: "The server has no image of this example." }, "no image");
  if (!url) return none();
  const onerror = ({ target }) => target.replaceWith(none());
  return el("img", { class: "picture", loading: "lazy", decoding: "async", alt: label, src: `${url}?size=${size}`, onerror });
}

/** Return an image of a file of the user. If it cannot be shown, it is replaced by `none`, or else removed. */
export function preview(file, alt, ...none) {
  const src = URL.createObjectURL(file);
  const done = () => URL.revokeObjectURL(src); // the element keeps the image
  return el("img", { alt, src, decoding: "async", onload: done, onerror: ({ target }) => (done(), target.replaceWith(...none)) });
}

export const noPreview = () => el("span", { class: "none" }, "no preview");

/** Return an error message. If `again` is given, add a button that tries again. */
export function failure(error, again) {
  const button = again && el("button", { type: "button", onclick: again }, "Try again");
  return el("span", { class: "failure" }, el("span", { role: "alert" }, error.message), " ", button);
}
