// One LoRA: how small it can get, what that costs, and what is inside.

import { address, get, post, Refused } from "./api.js";
import { Curve } from "./curve.js";
import { byId, el } from "./dom.js";
import { PicturesView } from "./pictures.js";
import { decibelText, errorMeaning, fineSizeText, percentText, pictureMeaning, sizeText } from "./text.js";

export const QUALITIES = { same: "same pictures", high: "high", small: "small file" };

const DTYPES = { auto: "the best that programs load", same: "in the file" };

const STEPS = 1000; // of the slider

export class AdapterView {
  constructor({ close, started }) {
    this.section = byId("adapter");
    this.close = close;
    this.started = started;
    this.id = "";
  }

  async open(id) {
    this.abort?.abort();
    this.abort = new AbortController();
    const { signal } = this.abort;
    this.asking = false;
    this.id = id;
    this.section.hidden = false;
    this.section.replaceChildren(this.closeButton(), el("p", { role: "status" }, "Reading …"));
    try {
      this.about = await get(`adapters/${id}`, {}, signal);
      this.goal = { by: "quality", value: "high" };
      this.help = { base: this.about.bases[0]?.id ?? "", calibration: this.about.calibration, dtype: "" };
      this.build();
      if (this.about.layers === 0) return;
      // Without a base it takes a moment, with one that was never read before some seconds: both, one after the other.
      await this.measure({}, signal);
      if (this.help.base || this.help.calibration) await this.compare(signal);
    } catch (error) {
      this.fail(error);
    }
  }

  // A model of the right family may still be of another size or kind; then the LoRA is measured alone.
  async compare(signal) {
    try {
      await this.measure(this.help, signal);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.help.base = "";
      byId("base").value = "";
      if (this.help.calibration) await this.measure(this.help, signal);
      else this.status.textContent = `Measured on the LoRA alone: ${error.message}`;
    }
  }

  leave() {
    this.abort?.abort();
    this.id = "";
    this.section.hidden = true;
    this.section.replaceChildren();
  }

  fail(error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) throw error;
    if (this.status) this.status.textContent = error.message;
    else this.section.append(el("p", { className: "error", role: "alert" }, error.message));
  }

  // --- the page of one LoRA ---------------------------------------------------------------------

  closeButton() {
    return el("button", { type: "button", className: "close", onclick: () => this.close() }, "Close");
  }

  build() {
    const about = this.about;
    const title = el("h2", { id: "adapter-title", tabIndex: -1 }, about.name.replace(/\.safetensors$/, ""));
    const rank = about.rank ? `rank ${about.rank}` : "";
    const kind = [sizeText(about.bytes), about.algo && `${about.algo}${about.family ? ` for ${about.family}` : ""}`, rank, about.dtype];
    this.section.setAttribute("aria-labelledby", "adapter-title");
    this.section.replaceChildren(
      this.closeButton(),
      title,
      el("p", { className: "facts" }, kind.filter(Boolean).join(", ")),
      about.shrunk ? el("p", { className: "note" }, "This one was made smaller by lorashrink already.") : "",
      ...this.findings(),
      ...(about.layers ? this.sizePart() : []),
      this.inside(),
    );
    title.focus({ preventScroll: true });
    this.section.scrollTop = 0;
  }

  findings() {
    if (!this.about.health.length) return [];
    const items = this.about.health.map((finding) => el("li", {}, finding.text));
    return [el("ul", { className: "findings", "aria-label": "What is unusual" }, items)];
  }

  sizePart() {
    this.status = el("p", { className: "note", role: "status" }, "Measuring how small it can get …");
    this.figure = el("div", { className: "figure" });
    this.slider = el("input", {
      type: "range", id: "slider", min: 0, max: STEPS, step: 1, disabled: true, "aria-label": "Size of the smaller file",
      oninput: () => this.slide(),
    });
    this.tiles = el("dl", { className: "tiles" });
    this.choices = el("fieldset", { className: "qualities" }, el("legend", {}, "How good should it be?"));
    this.shrinkButton = el("button", { type: "button", className: "main", disabled: true, onclick: () => this.shrink() }, "Shrink");
    this.command = el("code", {});
    this.pictures = new PicturesView(this.about, () => ({ ...this.goal, ...this.help }), this.started);
    return [
      el("section", { className: "sizes", "aria-labelledby": "sizes-title" },
        el("h3", { id: "sizes-title" }, "How small can it get?"),
        this.choices,
        el("p", { className: "note" }, "Error of the weights against size:"),
        el("div", { className: "slide" }, this.figure, this.slider),
        this.tiles,
        el("div", { className: "buttons" }, this.shrinkButton),
        this.status,
        this.options(),
        el("details", { className: "shell" }, el("summary", {}, "The same in a shell"),
          el("pre", {}, this.command),
          el("button", { type: "button", onclick: () => this.copy() }, "Copy")),
      ),
      this.pictures.element,
    ];
  }

  options() {
    const { bases, calibrations, rank } = this.about;
    const choose = (key) => (event) => {
      this.help = { ...this.help, [key]: event.target.value };
      this.measure(this.help, this.abort.signal).catch((error) => this.fail(error));
    };
    const select = (id, label, key, entries, none) =>
      el("div", {}, el("label", { htmlFor: id }, label),
        el("select", { id, onchange: choose(key) },
          el("option", { value: "" }, none),
          entries.map((entry) => el("option", { value: entry.id, selected: entry.id === this.help[key] }, `${entry.name} (${sizeText(entry.bytes)})`))));
    const number = el("input", { id: "rank", type: "number", min: 1, max: 1024, placeholder: rank });
    number.addEventListener("input", () => number.value > 0 && this.setGoal({ by: "rank", value: Math.round(number.value) }));
    const recipe = el("input", { id: "recipe", type: "text", placeholder: "fro_ckpt=1,thr=-3.55", autocomplete: "off", spellcheck: false });
    recipe.addEventListener("change", () => recipe.value && this.setGoal({ by: "recipe", value: recipe.value }));
    return el("details", { className: "options" }, el("summary", {}, "More ways to say it"),
      el("div", { className: "controls" },
        el("div", {}, el("label", { htmlFor: "rank" }, "Rank of all layers"), number),
        el("div", {}, el("label", { htmlFor: "recipe" }, "Recipe"), recipe),
        el("div", {}, el("label", { htmlFor: "dtype" }, "Numbers as"),
          el("select", { id: "dtype", onchange: choose("dtype") }, this.about.dtypes.map((dtype) =>
            el("option", { value: dtype === this.about.dtypes[0] ? "" : dtype }, DTYPES[dtype] ?? dtype)))),
        select("base", "Compare with the model", "base", bases, "no model"),
        select("calibration", "Calibration table", "calibration", calibrations, "none")),
      bases.length ? null : el("p", { className: "note" },
        `No model${this.about.family ? ` of ${this.about.family}` : ""} lies in the folders of this page. With one the choice is better: start lorashrink ui with the folder of your models too.`));
  }

  // --- measuring --------------------------------------------------------------------------------

  async measure(help, signal) {
    const measured = await get(`adapters/${this.id}/curve`, help, signal);
    this.qualities = measured.qualities;
    this.measuredWith = help;
    const bytes = measured.points.map((point) => point.bytes);
    this.curve = new Curve(measured.points, bytes[0], Math.max(this.about.bytes, ...bytes));
    this.figure.replaceChildren(this.curve.element);
    this.slider.disabled = false;
    this.shrinkButton.disabled = false;
    const focused = this.choices.contains(document.activeElement) ? document.activeElement.value : "";
    this.choices.replaceChildren(this.choices.firstChild, ...Object.entries(QUALITIES).map(([name, label]) => this.quality(name, label)));
    if (focused) this.choices.querySelector(`[value="${focused}"]`)?.focus();
    const base = this.about.bases.find((entry) => entry.id === help.base);
    const table = this.about.calibrations.find((entry) => entry.id === help.calibration);
    this.basis = table ? `Quality is predicted by ${table.name}.` : base ? `Compared with ${base.name}.` : "Measured on the LoRA alone.";
    await this.setGoal(this.goal);
  }

  quality(name, label) {
    const point = this.qualities[name];
    return el("label", {},
      el("input", { type: "radio", name: "quality", value: name, disabled: !point, checked: this.goal.by === "quality" && this.goal.value === name,
        onchange: () => this.setGoal({ by: "quality", value: name }) }),
      el("b", {}, label), el("span", {}, point ? sizeText(point.bytes) : "–"),
      el("small", {}, point ? `${percentText(point.bytes / this.about.bytes)} of the size` : "not with these numbers"));
  }

  slide() {
    const bytes = Math.round(this.curve.bytes(this.slider.value / STEPS));
    this.show({ bytes, error: this.curve.error(bytes) }, false); // at once; the exact numbers follow
    this.setGoal({ by: "size", value: bytes });
  }

  // One request at a time, and the last goal wins.
  async setGoal(goal) {
    this.goal = { ...goal };
    for (const radio of this.choices.querySelectorAll("input")) radio.checked = goal.by === "quality" && radio.value === goal.value;
    if (this.asking) return;
    this.asking = true;
    const { signal } = this.abort;
    try {
      let sent;
      do {
        sent = this.goal;
        const point = await get(`adapters/${this.id}/at`, { ...sent, ...this.measuredWith }, signal);
        if (this.goal === sent) this.show(point, true);
      } while (this.goal !== sent);
      this.status.textContent = this.basis;
    } catch (error) {
      this.fail(error);
    } finally {
      if (signal === this.abort.signal) this.asking = false;
    }
  }

  show(point, exact) {
    const before = this.about.bytes;
    const smaller = point.bytes < before;
    this.curve.moveTo(point.bytes, point.error);
    if (exact && this.goal.by !== "size") this.slider.value = String(Math.round(STEPS * this.curve.share(point.bytes)));
    const size = fineSizeText(point.bytes);
    const calibrated = Boolean(this.measuredWith.calibration);
    const decibels = point.predicted_db;
    const meaning = decibels ? pictureMeaning(decibels) : exact || !calibrated ? errorMeaning(point.error) : "";
    this.slider.setAttribute("aria-valuetext", [size, `error ${percentText(point.error)}`, meaning].filter(Boolean).join(", "));
    this.tiles.replaceChildren(
      tile("size now", sizeText(before), this.about.rank ? `rank ${this.about.rank}` : ""),
      tile("would be", size, smaller ? `${percentText(point.bytes / before)} of it` : "no smaller"),
      ...(calibrated ? [tile("predicted", decibels ? decibelText(decibels) : exact ? "–" : "…", decibels ? meaning : "")] : []),
      tile("error of the weights", percentText(point.error), decibels ? "" : meaning),
    );
    this.shrinkButton.textContent = `Shrink to ${size}`;
    this.shrinkButton.disabled = !smaller;
    if (!exact) return;
    this.command.textContent = point.command;
    this.showBlocks(point.blocks);
  }

  async copy() {
    await navigator.clipboard.writeText(this.command.textContent).catch(() => getSelection().selectAllChildren(this.command));
    this.status.textContent = "Copied.";
  }

  async shrink() {
    try {
      this.started(await post("shrink", { ids: [this.id], ...this.goal, ...this.help }));
    } catch (error) {
      this.fail(error);
    }
  }

  // --- inside -----------------------------------------------------------------------------------

  inside() {
    const { notes, loads, path } = this.about;
    this.blockRows = el("tbody", {});
    const table = el("table", { className: "blocks" },
      el("caption", {}, "Mean rank of the layers in each block: of the file, and what would be kept."),
      el("thead", {}, el("tr", {}, ...["block", "layers", "rank now", "would be", ""].map((head, index) =>
        el("th", { scope: "col", className: index ? "" : "text" }, head)))),
      this.blockRows);
    const details = (summary, ...children) => el("details", {}, el("summary", {}, summary), ...children);
    return el("section", { "aria-labelledby": "inside-title" },
      el("h3", { id: "inside-title" }, "About this file"),
      ...loads.map((line) => el("p", { className: "loads" }, sentence(line))),
      this.about.layers ? details("Block by block", el("div", { className: "scroll", role: "region", tabIndex: 0, "aria-label": "Ranks per block" }, table)) : null,
      Object.keys(notes).length
        ? details("How it was made", el("dl", { className: "notes" }, Object.entries(notes).map(([label, text]) => [el("dt", {}, label), el("dd", {}, text)])))
        : null,
      el("p", { className: "note path" }, path),
      el("p", {}, el("a", { href: address(`files/${this.about.id}`), download: this.about.name }, "Download")),
    );
  }

  showBlocks(blocks) {
    const most = Math.max(1, ...blocks.map((row) => row.before));
    this.blockRows.replaceChildren(...blocks.map((row) => el("tr", {},
      el("th", { scope: "row", className: "text" }, row.block), el("td", {}, row.layers),
      el("td", {}, rankText(row.before)), el("td", {}, rankText(row.after)),
      el("td", { className: "bars", "aria-hidden": "true" }, bar(row.before / most, "before"), bar(row.after / most, "after")))));
  }
}

function tile(name, value, note) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, note)));
}

function bar(share, kind) {
  const element = el("span", { className: `bar ${kind}` });
  element.style.setProperty("width", `${100 * share}%`);
  return element;
}

function rankText(rank) {
  return rank < 9.95 ? String(Number(rank.toFixed(1))) : String(Math.round(rank));
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
