// The list of LoRAs. Only the rows on the screen are elements, so that thousands of files scroll as ten do.

import { post } from "./api.js";
import { byId, debounced, el } from "./dom.js";
import { countText, percentText, sizeText } from "./text.js";

const ABOVE = 8; // rows beyond the edges that are drawn as well
const QUIET = 250; // milliseconds without scrolling after which sizes are measured

const SORTS = {
  name: (row) => row.name.toLowerCase(),
  family: (row) => row.family ?? "",
  rank: (row) => row.highest_rank,
  bytes: (row) => row.bytes,
  saving: (row) => (row.saving ? row.bytes - row.saving.bytes : ""),
};

export class LibraryView {
  constructor({ open, tick }) {
    this.rows = new Map();
    this.shown = [];
    this.ticked = new Set();
    this.chosen = "";
    this.sort = { key: "name", falling: false };
    this.open = open;
    this.tick = tick;
    this.list = byId("list");
    this.body = this.list.querySelector("tbody");
    this.measuresAll = false;
    this.measureShown = debounced(() => this.askForSizes(), QUIET);

    this.list.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.list);
    for (const id of ["search", "family", "show"]) byId(id).addEventListener("input", () => this.refine());
    for (const head of this.list.querySelectorAll("[data-sort]")) {
      head.querySelector("button").addEventListener("click", () => this.sortBy(head.dataset.sort));
    }
    byId("measure").addEventListener("click", () => this.measureAll());
    byId("tick-all").addEventListener("change", (event) => this.tickShown(event.target.checked));
    this.body.addEventListener("keydown", (event) => this.move(event));
  }

  // What the server says of files that changed.
  update({ rows, removed, unread, outside }, folders) {
    for (const row of rows) {
      this.rows.set(row.id, row);
      if (!canTick(row)) this.ticked.delete(row.id);
    }
    for (const id of removed) {
      this.rows.delete(id);
      this.ticked.delete(id);
    }
    this.unread = unread;
    this.outside = outside;
    this.folders = folders;
    if (rows.length || removed.length) this.filter();
    this.measureShown();
    this.sayTotals();
  }

  clear() {
    this.rows.clear();
    this.lastRequest = "";
  }

  adapters() {
    return [...this.rows.values()].filter((row) => row.kind === "adapter" || row.kind === "" || row.state === "failed");
  }

  filter() {
    const adapters = this.adapters();
    this.fillFamilies(adapters);
    const words = byId("search").value.toLowerCase().split(/\s+/);
    const family = byId("family").value;
    const show = byId("show").value;
    const kept = adapters.filter((row) => {
      const text = `${row.name} ${row.folder} ${row.title} ${row.trigger} ${row.family} ${row.algo} ${row.trained_on}`.toLowerCase();
      return (
        words.every((word) => text.includes(word)) &&
        (family === "" || row.family === family) &&
        (show === "" ||
          (show === "new" && !row.shrunk) ||
          (show === "shrunk" && row.shrunk) ||
          (show === "unusual" && (row.findings.length > 0 || row.error !== "")))
      );
    });
    const value = SORTS[this.sort.key];
    const sign = this.sort.falling ? -1 : 1;
    kept.sort((a, b) => order(value(a), value(b), sign) || order(a.name, b.name, 1) || order(a.folder || " ", b.folder || " ", 1));
    this.shown = kept;
    for (const head of this.list.querySelectorAll("[data-sort]")) {
      if (head.dataset.sort === this.sort.key) {
        head.setAttribute("aria-sort", this.sort.falling ? "descending" : "ascending");
      } else head.removeAttribute("aria-sort");
    }
    byId("files").setAttribute("aria-rowcount", String(kept.length + 1));
    byId("empty").hidden = kept.length > 0;
    byId("empty").textContent =
      adapters.length > 0
        ? "No LoRA fits these filters."
        : "There is no LoRA in this folder. Drop a .safetensors file here, or start lorashrink ui with another folder.";
    this.draw(true);
    this.sayTicked();
  }

  // Filters that changed show the first rows.
  refine() {
    this.list.scrollTop = 0;
    this.filter();
  }

  fillFamilies(adapters) {
    const select = byId("family");
    const families = [...new Set(adapters.map((row) => row.family).filter(Boolean))].sort();
    const present = [...select.options].slice(1).map((option) => option.value);
    if (families.join() === present.join()) return;
    const chosen = select.value;
    select.replaceChildren(el("option", { value: "" }, "all"), ...families.map((name) => el("option", { value: name }, name)));
    select.value = families.includes(chosen) ? chosen : "";
  }

  sortBy(key) {
    const falling = this.sort.key === key ? !this.sort.falling : ["bytes", "saving", "rank"].includes(key);
    this.sort = { key, falling };
    this.refine();
  }

  // --- rows on the screen ---------------------------------------------------------------------

  draw(anew = false) {
    const height = parseFloat(getComputedStyle(this.list).getPropertyValue("--row"));
    // A list that just became shorter has not been scrolled up yet.
    const top = Math.min(this.list.scrollTop, Math.max(0, this.shown.length * height - this.list.clientHeight));
    const first = Math.max(0, Math.floor(top / height) - ABOVE);
    const last = Math.min(this.shown.length, Math.ceil((top + this.list.clientHeight) / height) + ABOVE);
    if (!anew && this.first === first && this.last === last) return;
    [this.first, this.last] = [first, last];
    const active = document.activeElement?.closest?.("tr[data-id]");
    const focused = active && this.body.contains(active) ? [active.dataset.id, document.activeElement.className] : null;
    const rows = this.shown.slice(first, last).map((row, index) => this.rowElement(row, first + index));
    this.body.replaceChildren(spacer(first * height), ...rows, spacer((this.shown.length - last) * height));
    if (focused) this.body.querySelector(`tr[data-id="${focused[0]}"] .${focused[1]}`)?.focus({ preventScroll: true });
    this.measureShown();
  }

  rowElement(row, index) {
    const findings = row.error ? [row.error] : row.findings;
    const about = [row.folder, row.title && row.title !== row.name.replace(/\.safetensors$/, "") ? row.title : ""];
    const name = row.name.replace(/\.safetensors$/, "");
    return el(
      "tr",
      {
        "data-id": row.id, "aria-rowindex": index + 2, className: row.id === this.chosen ? "chosen" : "",
        onclick: (event) => event.target.closest("input, button, .tick") ?? this.open(row.id),
      },
      el("td", { className: "tick" }, el("input", {
        type: "checkbox", className: "box", checked: this.ticked.has(row.id), disabled: !canTick(row),
        "aria-label": `Tick ${name}`, onchange: (event) => this.setTicked(row.id, event.target.checked),
      })),
      el("th", { scope: "row", className: "text name" },
        el("button", {
          type: "button", className: "open", title: row.name, "aria-current": row.id === this.chosen ? "true" : null,
          onclick: () => this.open(row.id),
        }, name),
        el("small", {},
          row.shrunk ? el("span", { className: "badge" }, "shrunk") : null,
          findings.length ? el("span", { className: "badge warn", title: findings.join("\n") },
            row.error ? "cannot be read" : "unusual") : null,
          about.filter(Boolean).join(" · ")),
      ),
      el("td", { className: "text family", title: row.trained_on && `trained on ${row.trained_on}` },
        row.state === "listed" ? "…" : [row.family ?? "–", el("small", {}, row.trained_on || row.algo)]),
      el("td", { className: "rank" }, row.rank || "–"),
      el("td", { className: "size" }, sizeText(row.bytes)),
      el("td", { className: "saving" }, savingCell(row)),
    );
  }

  // The rows that can be seen are measured first; all others only if somebody wants that.
  askForSizes() {
    const visible = this.shown.slice(this.first, this.last).filter((row) => row.state === "listed" || needsSize(row));
    const ids = visible.map((row) => row.id);
    const request = [ids, visible.map((row) => row.state), this.measuresAll].join();
    if (request !== this.lastRequest) {
      this.lastRequest = request;
      post("measure", { ids, all: this.measuresAll }).catch(() => (this.lastRequest = ""));
    }
  }

  measureAll() {
    this.measuresAll = true;
    this.askForSizes();
    this.sayTotals();
  }

  get waiting() {
    return (this.measuresAll ? this.adapters() : this.shown.slice(this.first, this.last)).some(needsSize);
  }

  move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    const tr = event.target.closest("tr[data-id]");
    if (step === undefined || !tr) return;
    event.preventDefault();
    const index = this.shown.findIndex((row) => row.id === tr.dataset.id);
    this.focusRow(Math.min(this.shown.length - 1, Math.max(0, index + step)), event.target.className);
  }

  focusRow(index, control = "open") {
    const height = parseFloat(getComputedStyle(this.list).getPropertyValue("--row"));
    const head = this.list.querySelector("thead").offsetHeight;
    const top = index * height;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    const bottom = top + height + head - this.list.clientHeight;
    if (bottom > this.list.scrollTop) this.list.scrollTop = bottom;
    this.draw(true);
    this.body.querySelector(`tr[data-id="${this.shown[index].id}"] .${control}`)?.focus({ preventScroll: true });
  }

  choose(id) {
    this.chosen = id;
    this.draw(true);
  }

  // --- ticks ------------------------------------------------------------------------------------

  setTicked(id, on) {
    if (on) this.ticked.add(id);
    else this.ticked.delete(id);
    this.sayTicked();
  }

  tickShown(on) {
    for (const row of this.shown) if (canTick(row)) this.setTicked(row.id, on);
    this.draw(true);
  }

  sayTicked() {
    const rows = [...this.ticked].map((id) => this.rows.get(id)).filter(Boolean);
    const bytes = rows.reduce((sum, row) => sum + row.bytes, 0);
    const all = this.shown.filter(canTick);
    const box = byId("tick-all");
    box.checked = all.length > 0 && all.every((row) => this.ticked.has(row.id));
    box.indeterminate = !box.checked && all.some((row) => this.ticked.has(row.id));
    byId("ticked").hidden = rows.length === 0;
    byId("ticked-count").textContent = `${countText(rows.length, "LoRA")} ticked, ${sizeText(bytes)}`;
    byId("ticked-shrink").textContent = `Shrink ${countText(rows.length, "LoRA")}`;
    this.tick();
  }

  sayTotals() {
    const adapters = this.adapters();
    const bytes = adapters.reduce((sum, row) => sum + row.bytes, 0);
    const measured = adapters.filter((row) => row.saving && !row.shrunk);
    const saved = measured.reduce((sum, row) => sum + Math.max(0, row.bytes - row.saving.bytes), 0);
    const parts = [`${countText(adapters.length, "LoRA")}, ${sizeText(bytes)}`];
    if (this.unread) parts.push(`reading ${countText(this.unread, "file")} …`);
    if (measured.length) {
      const of = measured.length < adapters.length ? ` (in the ${measured.length.toLocaleString("en")} looked at so far)` : "";
      parts.push(`${sizeText(saved)} could be saved at high quality${of}`);
    }
    set(byId("totals"), parts.join("; "));
    set(byId("folders"), (this.folders ?? []).join("\n"));
    byId("measure").hidden = this.measuresAll || !adapters.some(needsSize);
    const note = this.outside
      ? `Left out: ${countText(this.outside, "link")} to files outside of the folder. Start lorashrink ui with their folder too.`
      : "";
    set(byId("library-note"), note);
  }
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function needsSize(row) {
  return row.kind === "adapter" && row.layers > 0 && !row.shrunk && !row.saving && !row.saving_error;
}

// Files whose header was not read yet may turn out to be something else.
function canTick(row) {
  return row.state === "listed" || (row.kind === "adapter" && row.layers > 0);
}

function savingCell(row) {
  if (row.saving) {
    if (row.saving.bytes >= row.bytes) return el("span", { className: "soft" }, "no smaller");
    return [sizeText(row.saving.bytes), el("small", {}, `${percentText(row.saving.bytes / row.bytes)} of it`)];
  }
  if (row.saving_error) return el("span", { className: "soft", title: row.saving_error }, "–");
  return needsSize(row) ? el("span", { className: "soft" }, "…") : el("span", { className: "soft" }, "–");
}

function spacer(height) {
  const row = el("tr", { "aria-hidden": "true", className: "spacer" }, el("td", {}));
  row.style.setProperty("height", `${height}px`);
  return row;
}

// Rows without a value come last, whichever way the table is sorted.
function order(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
}
