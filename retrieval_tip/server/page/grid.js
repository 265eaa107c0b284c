// A listbox of tiles that can be used with a mouse or a keyboard. The document only contains tiles near the window.

const GAP = 8;
const LEAST = 152; // minimum width of a tile, in px
const FEWEST = 3; // minimum number of columns, on phones
const BELOW = 32; // height of the text below the image, in px
const HEAD = 40;
const AHEAD = 700; // tiles are drawn up to this many px outside the window

/** A grid of items, which are objects that have an `id`. `tile(item, element)` creates or updates an element,
 *  `opened(item)` handles Enter and clicks, `chosen()` handles a changed selection, and `pressed(event)` handles all
 *  other keys. */
export class Grid {
  selected = new Set();
  active = null;
  #items = []; // in the order in which they are shown
  #places = new Map(); // { x, y, row, at } by item
  #heads = [];
  #mounted = new Map(); // elements by item or head
  #columns = 1;
  #width = 0;
  #anchor = null;
  #frame = 0;

  constructor(element, { tile, opened, chosen, pressed }) {
    Object.assign(this, { element, tile, opened, chosen, pressed });
    addEventListener("scroll", () => this.#soon(), { passive: true, capture: true });
    // A grid on a hidden screen has no width, so its tiles keep their places.
    new ResizeObserver(() => element.clientWidth && element.clientWidth !== this.#width && this.show(this.groups)).observe(element);
    element.addEventListener("click", (event) => this.#click(event));
    element.addEventListener("keydown", (event) => this.#key(event));
    element.addEventListener("focus", () => this.active ?? this.go(this.#items[0]));
  }

  /** Show groups, given as [{ label, items }]. A group whose label is null has no heading. */
  show(groups) {
    this.groups = groups ?? [];
    this.#width = this.element.clientWidth;
    this.#columns = Math.max(FEWEST, Math.floor((this.#width + GAP) / (LEAST + GAP)));
    const wide = (this.#width + GAP) / this.#columns - GAP;
    const high = wide + BELOW;
    let y = 0;
    this.#items = [];
    this.#heads = [];
    this.#places.clear();
    let row = 0;
    for (const { label, items } of this.groups) {
      if (label !== null) {
        this.#heads.push({ label: `${label} · ${items.length}`, y, at: this.#items.length - 0.5 });
        y += HEAD;
      }
      items.forEach((item, i) => {
        const column = i % this.#columns;
        if (i && !column) {
          y += high + GAP;
          row++;
        }
        this.#places.set(item, { x: column * (wide + GAP), y, row, column, at: this.#items.length });
        this.#items.push(item);
      });
      if (items.length) y += high + GAP;
      row++;
    }
    this.element.style.height = `${Math.max(0, y - GAP)}px`;
    this.element.style.setProperty("--tile", `${wide}px`);
    if (this.active && !this.#places.has(this.active)) this.active = null;
    for (const item of this.selected) if (!this.#places.has(item)) this.selected.delete(item);
    this.draw();
  }

  get items() {
    return this.#items;
  }

  #soon() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.draw(false));
  }

  /** Draw the tiles near the window. If `again` is true, also update tiles that have already been drawn. */
  draw(again = true) {
    const top = -this.element.getBoundingClientRect().top - AHEAD;
    const bottom = top + innerHeight + 2 * AHEAD;
    const wanted = new Set();
    for (const head of this.#heads) if (head.y > top && head.y < bottom) wanted.add(head);
    let low = 0;
    let high = this.#items.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#places.get(this.#items[middle]).y < top) low = middle + 1;
      else high = middle;
    }
    for (let i = low; i < this.#items.length && this.#places.get(this.#items[i]).y < bottom; i++)
      wanted.add(this.#items[i]);
    if (this.active) wanted.add(this.active); // aria-activedescendant needs it
    for (const [item, element] of this.#mounted) {
      if (wanted.has(item)) continue;
      element.remove();
      this.#mounted.delete(item);
    }
    let before = null;
    const order = (item) => this.#places.get(item)?.at ?? item.at;
    for (const item of [...wanted].sort((a, b) => order(a) - order(b))) {
      let element = this.#mounted.get(item);
      const fresh = !element;
      if (fresh) this.#mounted.set(item, (element = this.#made(item)));
      if (fresh || again) {
        const place = this.#places.get(item);
        element.style.transform = `translate(${place?.x ?? 0}px, ${(place ?? item).y}px)`;
        if (place) {
          if (!fresh) this.tile(item, element);
          element.setAttribute("aria-posinset", place.at + 1);
          element.setAttribute("aria-setsize", this.#items.length);
          this.#mark(item, element);
        }
      }
      const next = before ? before.nextSibling : this.element.firstChild;
      if (next !== element) this.element.insertBefore(element, next);
      before = element;
    }
    if (this.active) this.element.setAttribute("aria-activedescendant", this.active.id);
    else this.element.removeAttribute("aria-activedescendant");
  }

  #made(item) {
    if (!this.#places.has(item)) {
      const head = document.createElement("div");
      head.className = "group";
      head.setAttribute("aria-hidden", "true"); // each tile contains its class
      head.textContent = item.label;
      return head;
    }
    const element = this.tile(item, null);
    element.id = item.id;
    element.classList.add("tile");
    element.setAttribute("role", "option");
    element.item = item;
    return element;
  }

  #mark(item, element) {
    element.setAttribute("aria-selected", String(this.selected.has(item)));
    element.classList.toggle("active", item === this.active);
  }

  /** Update a tile if it has been drawn. */
  redraw(item) {
    const element = this.#mounted.get(item);
    if (element) this.tile(item, element);
  }

  select(items) {
    this.selected = new Set(items);
    this.#changed();
  }

  #changed() {
    for (const [item, element] of this.#mounted) if (this.#places.has(item)) this.#mark(item, element);
    this.chosen();
  }

  #toggle(item) {
    if (!this.selected.delete(item)) this.selected.add(item);
    this.#anchor = item;
    this.#changed();
  }

  /** Select all items between the last selected item and this one. */
  #stretch(item) {
    const from = this.#places.get(this.#anchor ?? this.active ?? item)?.at ?? 0;
    const to = this.#places.get(item).at;
    for (const one of this.#items.slice(Math.min(from, to), Math.max(from, to) + 1)) this.selected.add(one);
    this.#changed();
  }

  #click(event) {
    const item = event.target.closest(".tile")?.item;
    if (!item) return;
    if (event.shiftKey) this.#stretch(item);
    else if (event.ctrlKey || event.metaKey || event.target.closest(".tick")) this.#toggle(item);
    else this.opened(item);
    this.go(item);
  }

  /** Activate an item, and scroll to it. */
  go(item) {
    if (!item || !this.#places.has(item)) return;
    this.active = item;
    this.draw();
    this.#mounted.get(item).scrollIntoView({ block: "nearest" });
  }

  #key(event) {
    if (event.target !== this.element) return;
    const at = this.active ? this.#places.get(this.active).at : -1;
    const to = this.#target(event.key, at);
    if (to) {
      if (event.shiftKey) {
        this.#anchor ??= this.active;
        this.#stretch(to);
      } else this.#anchor = to;
      this.go(to);
    } else if (event.key === " " && this.active) this.#toggle(this.active);
    else if (event.key === "Enter" && this.active) this.opened(this.active);
    else if (event.key === "a" && (event.ctrlKey || event.metaKey)) this.select(this.#items);
    else if (event.key === "Escape" && this.selected.size) this.select([]);
    else if (!this.pressed(event)) return;
    event.preventDefault();
  }

  #target(key, at) {
    if (key === "Home") return this.#items[0];
    if (key === "End") return this.#items.at(-1);
    if (key === "ArrowRight") return this.#items[at + 1];
    if (key === "ArrowLeft") return this.#items[at - 1];
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 4, PageUp: -4 }[key];
    if (!by || at < 0) return by ? this.#items[0] : undefined;
    const { row, column } = this.#places.get(this.#items[at]);
    let best;
    for (let i = at; i >= 0 && i < this.#items.length; i += Math.sign(by)) {
      const place = this.#places.get(this.#items[i]);
      const steps = Math.abs(place.row - row);
      if (steps > Math.abs(by)) break;
      if (steps && (!best || steps > best.steps || Math.abs(place.column - column) < best.far))
        best = { item: this.#items[i], steps, far: Math.abs(place.column - column) };
    }
    return best?.item;
  }
}
