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

/** Return a button. Its content is a text, or a list of texts and elements. */
export const button = (content, onclick, properties = {}) => el("button", { type: "button", onclick, ...properties }, ...[content].flat());

/** Return the small button that closes something. `label` says what for screen readers. */
export const cross = (label, onclick, properties = {}) => button("×", onclick, { class: "quiet", aria: { label }, ...properties });

/** Return a field for the name of a class, which suggests the known classes. */
export function classField(properties) {
  const field = el("input", { autocomplete: "off", ...properties });
  field.setAttribute("list", "class-names");
  return field;
}

/** Call `call(name)` when a name is entered in the field of a form. */
export function named(form, call) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const name = form.querySelector("input").value.trim();
    if (name) call(name);
  });
}

/** Let buttons open a file input, and call `take(files)` with the selected files. */
export function picks(input, take, ...buttons) {
  for (const one of buttons) one.addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = ""; // allows the same file to be selected again
  });
}

/** Return a button for each class. The first three can be chosen by their numbers. */
export const chips = (labels, choose) =>
  labels.map((label, i) => button([i < 3 ? el("kbd", {}, `${i + 1} `) : "", cut(label)], () => choose(label), { class: "chip", title: label }));

/** Whether a key is pressed without a key that gives it another meaning. */
export const isBare = (event) => !event.ctrlKey && !event.metaKey && !event.altKey;

/** Whether a key is meant for a view, and not for a dialog or a menu. */
export const isFor = (view, event) => !$(view).hidden && isBare(event) && !document.querySelector("dialog[open], :popover-open");

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

/** Return a function that calls `call` with its last arguments when it has not been called for `milliseconds`. */
export function debounced(milliseconds, call) {
  let timer;
  return (...last) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...last), milliseconds);
  };
}

/** Return a function that runs `call` with the next frame, once for all calls before it. */
export function framed(call) {
  let frame;
  return () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(call);
  };
}

/** Whether the user prefers reduced motion, as `calm.matches`. */
export const calm = matchMedia("(prefers-reduced-motion: reduce)");

export const whole = (share) => Math.round(100 * share);

/** Format a share without decimals. A share that is not certain is never shown as 0 % or 100 %. */
export const percent = (share) => `${share < 0.01 ? "<1" : share > 0.99 ? ">99" : whole(share)}\u00a0%`;

/** Format a whole number with narrow spaces. */
export const count = (number) => number.toLocaleString("en").replaceAll(",", "\u202f");

const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, useGrouping: false });

/** Format a number with few digits. */
export const short = (value) => (Number.isFinite(value) ? digits.format(value).replace("-", "−") : "–");

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

/** Shorten a long name in its middle. The element that shows it should have the whole name as its title. */
export function cut(name, most = 24) {
  const letters = [...name];
  const [start, end] = [letters.slice(0, most / 2), letters.slice(1 - most / 2)];
  return letters.length > most ? `${start.join("")}…${end.join("")}` : name;
}

/** Return the last `parts` parts of a path. */
export const nameOf = (source, parts = 1) => String(source).split(/[\\/]/).filter(Boolean).slice(-parts).join("/");

/** Return the image of an example, or a placeholder if the server does not have the image. */
export function picture(url, size, label) {
  const none = () => el("span", { class: "picture none", title: "The server has no image of this example." }, "no image");
  if (!url) return none();
  const onerror = ({ target }) => target.replaceWith(none());
  return el("img", { class: "picture", loading: "lazy", decoding: "async", alt: label, src: `${url}${url.includes("?") ? "&" : "?"}size=${size}`, onerror });
}

/** Return an image of a file of the user, or a placeholder if the browser cannot show it. */
export function preview(file, alt) {
  const src = URL.createObjectURL(file);
  const done = () => URL.revokeObjectURL(src); // the element keeps the image
  const none = () => el("span", { class: "none" }, "no preview");
  return el("img", { alt, src, decoding: "async", onload: done, onerror: ({ target }) => (done(), target.replaceWith(none())) });
}

/** Do some work. If it fails without being aborted, show the reason in an element, and offer to try again. */
export async function attempt(place, work) {
  place.replaceChildren();
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") place.replaceChildren(failure(error, () => attempt(place, work)));
  }
}

/** Return an error message. If `again` is given, add a button that tries again. */
export function failure(error, again) {
  return el("span", { class: "failure" }, el("span", { role: "alert" }, error.message), " ", again && button("Try again", again));
}
