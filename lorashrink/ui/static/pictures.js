// Before and after: the model draws the same prompts with the LoRA and with the smaller one.

import { address, post, Refused } from "./api.js";
import { el } from "./dom.js";
import { sizeText } from "./text.js";

export class PicturesView {
  constructor(about, goal, started) {
    this.about = about;
    this.goal = goal;
    this.started = started;
    this.element = el("section", { className: "pictures", "aria-labelledby": "pictures-title" },
      el("h3", { id: "pictures-title" }, "Does it still look the same?"));
    this.build();
  }

  build() {
    const { models, prompts, cannot_draw: reason } = this.about;
    if (reason || !models.length) {
      const family = this.about.family ? ` of ${this.about.family}` : "";
      this.element.append(el("p", { className: "note" }, reason ||
        `To draw with it, put a model${family} into the folder (a diffusers folder or a single file), or start lorashrink ui with the folder of your models too.`));
      return;
    }
    this.model = el("select", { id: "model" }, models.map((entry) => el("option", { value: entry.id }, `${entry.name} (${sizeText(entry.bytes)})`)));
    this.prompts = el("textarea", { id: "prompts", rows: 3, value: prompts.join("\n"), placeholder: "what to draw, one picture a line" });
    this.steps = el("input", { id: "steps", type: "number", min: 1, max: 100, value: 20 });
    this.message = el("p", { className: "note", role: "status" });
    this.result = el("div", {});
    this.element.append(
      el("div", { className: "controls" },
        el("div", {}, el("label", { htmlFor: "model" }, "Model"), this.model),
        el("div", {}, el("label", { htmlFor: "steps" }, "Steps"), this.steps),
        el("div", { className: "wide" }, el("label", { htmlFor: "prompts" }, "Prompts, one a line"), this.prompts)),
      el("div", { className: "buttons" }, el("button", { type: "button", onclick: () => this.draw() }, "Draw before and after")),
      this.message,
      this.result,
    );
  }

  async draw() {
    try {
      const job = await post("pictures", {
        id: this.about.id, model: this.model.value, prompts: this.prompts.value, steps: Number(this.steps.value), ...this.goal(),
      });
      this.job = job.id;
      this.message.textContent = "Drawing in the background; you can go on.";
      this.started(job);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.message.textContent = error.message;
    }
  }

  // The jobs as the server tells them: pictures appear as soon as they are drawn.
  update(jobs) {
    const job = jobs.findLast((job) => job.kind === "pictures" && job.adapter === this.about.id);
    const text = JSON.stringify(job?.results ?? []);
    if (!job || !this.result || text === this.shownText) return;
    this.shownText = text;
    if (job.results.length) this.message.textContent = "";
    this.result.replaceChildren(...job.results.map((result, index) => comparison(result, `${this.about.id}-${index}`)));
  }
}

function comparison(result, id) {
  const cut = el("div", { className: "slider" },
    el("img", { src: address(`pictures/${result.before}`), alt: `${result.label}: the original LoRA` }),
    el("img", { src: address(`pictures/${result.after}`), alt: `${result.label}: the smaller one` }));
  const divider = el("input", { type: "range", min: 0, max: 100, value: 50, id: `divider-${id}`, "aria-label": `Divider of ${result.label}` });
  const move = () => {
    cut.style.setProperty("--cut", `${divider.value}%`);
    divider.setAttribute("aria-valuetext", `the original LoRA up to ${divider.value} % of the width`);
  };
  divider.addEventListener("input", move);
  move();
  const difference = el("input", { type: "checkbox", onchange: (event) => cut.classList.toggle("difference", event.target.checked) });
  return el("figure", { className: "compare" }, cut,
    el("div", { className: "ends", "aria-hidden": "true" }, el("span", {}, "before"), el("span", {}, `after, ${sizeText(result.bytes)}`)),
    divider,
    el("figcaption", {}, el("b", {}, result.verdict), ` ${result.label} at ${sizeText(result.bytes)} (${result.psnr.toFixed(1)} dB)`),
    el("label", {}, difference, " Show the difference, four times as bright"));
}
