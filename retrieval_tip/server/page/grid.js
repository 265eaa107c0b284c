// A listbox of tiles that can be used with a mouse or a keyboard. The document only contains tiles near the window.

import { cut, el, framed } from "./dom.js";

const GAP = 8;
const LEAST = 152; // minimum width of a tile, in px
const FEWEST = 3; // minimum number of columns, on phones
const BELOW = 32; // height of the text below the image, in px
const DRAWN = 8; // a shorter movement of the mouse is a click, in px
const LETTERS = 20; // maximum length of a text below the image
const AHEAD = 700; // tiles are drawn up to this many px outside the window

/** A grid of items, which are objects that have an `id`. `image(item)` returns the image of a tile, and
 *  `tile(item, element, text, note)` shows an item on its tile, which has a text and a note below the image.
 *  `together(item)` returns the items that belong to one, and `kind(item)` what neighbours have in common. `opened(item,
 *  target)` handles Enter and clicks, `accepted(all)` Shift+Enter, and Enter if items are selected, `chosen()` a changed
 *  selection, and `pressed(event)` all other keys. */
export class Grid {
  selected = new Set();
  active = null;
  items = []; // in the order in which they are shown
  #at = new Map(); // positions by item
  #mounted = new Map(); // elements by item
  #width = 0;
  #columns = FEWEST;
  #wide = 0; // of a tile
  #high = 0; // of a row
  #drawn = false; // whether a rectangle has just been drawn
  #anchor = null;
  #soon = framed(() => this.draw(false));

  constructor(element, { image, tile, opened, chosen, pressed, accepted, kind, together = (item) => [item] }) {
    Object.assign(this, { element, image, tile, opened, chosen, pressed, accepted, kind, together });
    addEventListener("scroll", () => this.#soon(), { passive: true, capture: true });
    // A grid on a hidden screen has no width, so its tiles keep their places.
    new ResizeObserver(() => element.clientWidth && element.clientWidth !== this.#width && this.show(this.items)).observe(element);
    element.addEventListener("click", (event) => this.#click(event));
    element.addEventListener("pointerdown", (event) => this.#lasso(event));
    element.addEventListener("dragstart", (event) => event.preventDefault());
    element.addEventListener("keydown", (event) => this.#key(event));
    element.addEventListener("focus", () => this.active ?? this.go(this.onScreen()[0] ?? this.items[0], false));
  }

  /** Show items. */
  show(items) {
    this.items = items;
    this.#width = this.element.clientWidth;
    this.#columns = Math.max(FEWEST, Math.floor((this.#width + GAP) / (LEAST + GAP)));
    this.#wide = (this.#width + GAP) / this.#columns - GAP;
    this.#high = this.#wide + BELOW + GAP;
    this.#at = new Map(items.map((item, at) => [item, at]));
    this.element.style.height = `${Math.max(0, Math.ceil(items.length / this.#columns) * this.#high - GAP)}px`;
    this.element.style.setProperty("--tile", `${this.#wide}px`);
    if (!this.#at.has(this.active)) this.active = null;
    for (const item of this.selected) if (!this.#at.has(item)) this.selected.delete(item);
    this.draw();
    this.chosen();
  }

  /** Return the place of a tile in the grid. */
  #place(item) {
    const at = this.#at.get(item);
    return { x: (at % this.#columns) * (this.#wide + GAP), y: Math.floor(at / this.#columns) * this.#high };
  }

  /** Return the items that are visible in the window, or those that are whole below a line of the window. */
  onScreen(line = null) {
    const isVisible = ({ top, bottom }) => (line === null ? bottom > 0 && top < innerHeight : top >= line && bottom <= innerHeight);
    return this.items.filter((item) => this.#mounted.has(item) && isVisible(this.#mounted.get(item).getBoundingClientRect()));
  }

  /** Draw the tiles near the window. If `again` is true, also update tiles that have already been drawn. */
  draw(again = true) {
    const top = -this.element.getBoundingClientRect().top - AHEAD;
    const bottom = top + innerHeight + 2 * AHEAD;
    const [first, last] = [top, bottom].map((y) => Math.max(0, Math.floor(y / this.#high) + 1) * this.#columns);
    const isWanted = (item, at) => (at >= first && at < last) || item === this.active; // aria-activedescendant needs it
    const wanted = new Set(this.items.filter(isWanted));
    for (const [item, element] of this.#mounted) {
      if (wanted.has(item)) continue;
      element.remove();
      this.#mounted.delete(item);
    }
    [...wanted].forEach((item, i) => {
      const fresh = !this.#mounted.has(item);
      if (fresh) this.#mounted.set(item, this.#made(item));
      const [element, there] = [this.#mounted.get(item), this.element.children[i] ?? null];
      if (fresh || again) this.#update(item, element);
      if (element !== there) this.element.insertBefore(element, there);
    });
    if (this.active) this.element.setAttribute("aria-activedescendant", this.active.id);
    else this.element.removeAttribute("aria-activedescendant");
  }

  #made(item) {
    const marks = [["tick", "✓"], ["visit"], ["others"]].map(([name, text]) => el("span", { class: name, aria: { hidden: "true" } }, text));
    const image = el("span", { class: "frame" }, this.image(item), ...marks);
    const [text, note] = [el("span", { class: "said" }), el("span", { class: "chip-of" })];
    return el("div", { id: item.id, class: "tile", role: "option", item }, image, text, note);
  }

  #update(item, element) {
    const { x, y } = this.#place(item);
    element.style.transform = `translate(${x}px, ${y}px)`;
    const texts = [...element.children].slice(1);
    this.tile(item, element, ...texts);
    for (const text of texts) [text.title, text.textContent] = [text.textContent, cut(text.textContent, LETTERS)];
    element.setAttribute("aria-posinset", this.#at.get(item) + 1);
    element.setAttribute("aria-setsize", this.items.length);
    element.setAttribute("aria-selected", String(this.selected.has(item)));
    element.classList.toggle("active", item === this.active);
  }

  select(items) {
    this.selected = new Set(items);
    this.#changed();
  }

  #changed() {
    this.draw();
    this.chosen();
  }

  /** Select items, or clear their selection if all of them are selected. */
  toggle(items) {
    const all = items.every((item) => this.selected.has(item));
    for (const item of items) this.selected[all ? "delete" : "add"](item);
    this.#anchor = items[0];
    this.#changed();
  }

  /** Select all items between the last selected item and this one. */
  #stretch(item) {
    const from = this.#at.get(this.#anchor ?? this.active ?? item) ?? 0;
    const to = this.#at.get(item);
    for (const one of this.items.slice(Math.min(from, to), Math.max(from, to) + 1)) this.selected.add(one);
    this.#changed();
  }

  /** Select the tiles that a rectangle touches while the mouse draws it, or a finger that begins at a mark. */
  #lasso(start) {
    const isTouch = start.pointerType !== "mouse";
    this.#drawn = false;
    if (start.button !== 0 || (isTouch && !start.target.closest(".tick"))) return;
    const before = isTouch || start.shiftKey || start.ctrlKey || start.metaKey ? [...this.selected] : [];
    const inside = ({ clientX, clientY }) => {
      const { left, top } = this.element.getBoundingClientRect();
      return [clientX - left, clientY - top];
    };
    const from = inside(start);
    const box = el("div", { class: "lasso" });
    const move = (event) => {
      const to = inside(event);
      const [left, top, right, bottom] = [...from.map((x, i) => Math.min(x, to[i])), ...from.map((x, i) => Math.max(x, to[i]))];
      if (!box.isConnected && Math.max(right - left, bottom - top) < DRAWN) return;
      this.element.append(box);
      Object.assign(box.style, { left: `${left}px`, top: `${top}px`, width: `${right - left}px`, height: `${bottom - top}px` });
      const isTouched = ({ x, y }) => x < right && x + this.#wide > left && y < bottom && y + this.#wide > top;
      this.select([...before, ...this.items.filter((item) => isTouched(this.#place(item)))]);
    };
    const end = () => {
      removeEventListener("pointermove", move);
      this.#drawn = box.isConnected; // the click that follows selects nothing else
      box.remove();
    };
    addEventListener("pointermove", move);
    for (const type of ["pointerup", "pointercancel"]) addEventListener(type, end, { once: true });
  }

  #click(event) {
    const item = event.target.closest(".tile")?.item;
    if (this.#drawn || !item) return;
    if (event.shiftKey) this.#stretch(item);
    else if (event.target.closest(".visit")) this.toggle(this.together(item));
    else if (event.ctrlKey || event.metaKey || event.target.closest(".tick")) this.toggle([item]);
    else this.opened(item, event.target);
    this.go(item);
  }

  /** Activate an item, and scroll to it. */
  go(item, scroll = true) {
    if (!this.#at.has(item)) return;
    this.active = item;
    this.draw();
    if (scroll) this.#mounted.get(item).scrollIntoView({ block: "nearest" });
  }

  #key(event) {
    if (event.target !== this.element) return;
    const at = this.#at.get(this.active) ?? -1;
    const to = event.ctrlKey || event.metaKey ? this.#jump(event.key, at) : this.#target(event.key, at);
    if (to) {
      if (event.shiftKey) {
        this.#anchor ??= this.active;
        this.#stretch(to);
      } else this.#anchor = to;
      this.go(to);
    } else if (event.key === " " && this.active) this.toggle(event.shiftKey ? this.together(this.active) : [this.active]);
    else if (event.key === "Enter" && this.accepted && (event.shiftKey || this.selected.size)) event.repeat || this.accepted(event.shiftKey);
    else if (event.key === "Enter" && this.active) this.opened(this.active);
    else if (event.key === "a" && (event.ctrlKey || event.metaKey)) this.select(this.items);
    else if (event.key === "Escape" && this.selected.size) this.select([]);
    else if (!this.pressed(event)) return;
    event.preventDefault();
  }

  /** Return the first item of the next kind, or of the one before. */
  #jump(key, at) {
    const starts = this.items.filter((item, i) => i === 0 || this.kind(item) !== this.kind(this.items[i - 1]));
    if (key === "ArrowRight") return starts.find((item) => this.#at.get(item) > at);
    if (key === "ArrowLeft") return starts.findLast((item) => this.#at.get(item) < at);
  }

  #target(key, at) {
    if (key === "Home") return this.items[0];
    if (key === "End") return this.items.at(-1);
    if (key === "ArrowRight") return this.items[at + 1];
    if (key === "ArrowLeft") return this.items[at - 1];
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 4, PageUp: -4 }[key];
    if (!by || at < 0) return by ? this.items[0] : undefined;
    const columns = this.#columns;
    const [row, most] = [Math.floor(at / columns), this.items.length - 1];
    const wanted = Math.min(Math.max(0, row + by), Math.floor(most / columns));
    return wanted === row ? undefined : this.items[Math.min(at + (wanted - row) * columns, most)];
  }
}
