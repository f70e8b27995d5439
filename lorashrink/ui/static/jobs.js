// What is being done in the background, and what came of it.

import { address, post, Refused } from "./api.js";
import { byId, el } from "./dom.js";
import { countText, decibelText, percentText, sizeText } from "./text.js";

export class JobsView {
  constructor({ changed }) {
    this.section = byId("jobs");
    this.changed = changed;
    this.jobs = [];
    this.hidden = new Set();
    this.elements = new Map();
  }

  get busy() {
    return this.jobs.some((job) => !over(job));
  }

  update(jobs) {
    this.jobs = jobs.filter((job) => !this.hidden.has(job.id));
    this.section.hidden = this.jobs.length === 0;
    const ids = new Set(this.jobs.map((job) => job.id));
    for (const [id, { element }] of this.elements) {
      if (!ids.has(id)) {
        element.remove();
        this.elements.delete(id);
      }
    }
    for (const job of this.jobs) this.show(job);
  }

  show(job) {
    const text = JSON.stringify(job);
    const present = this.elements.get(job.id);
    if (present?.text === text) return;
    const element = present?.element ?? el("article", { className: "job" });
    if (!present) this.section.prepend(element);
    this.elements.set(job.id, { element, text });
    const focused = element.contains(document.activeElement) ? document.activeElement.className : "";
    element.replaceChildren(
      el("div", { className: "head" }, el("h3", { role: "status" }, headline(job)), el("div", { className: "buttons" }, this.buttons(job))),
      over(job) || job.total < 2 ? "" : el("progress", { max: job.total, value: job.done, "aria-label": job.title }),
      job.error ? el("p", { className: "error" }, job.error) : "",
      job.kind === "shrink" && job.results.length ? results(job) : "",
      job.results.length < job.counts.results ? el("p", { className: "note" }, `The last ${job.results.length} of ${countText(job.counts.results, "LoRA")}.`) : "",
      ...job.failed.map((failure) => el("p", { className: "error" }, failure.error)),
    );
    if (focused) element.querySelector(`.${focused}`)?.focus();
  }

  buttons(job) {
    const ask = (path) => async () => {
      try {
        await post(`jobs/${job.id}/${path}`);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
      }
      this.changed();
    };
    if (!over(job)) return [el("button", { type: "button", className: "cancel", "aria-label": `Cancel: ${job.title}`, onclick: ask("cancel") }, "Cancel")];
    return [
      job.can_undo ? el("button", { type: "button", className: "undo", "aria-label": `Undo: ${job.title}`, onclick: ask("undo"), title: "Delete what was written, and nothing else" }, "Undo") : null,
      el("button", { type: "button", className: "hide", "aria-label": `Close: ${job.title}`, onclick: () => this.hide(job) }, "Close"),
    ].filter(Boolean);
  }

  hide(job) {
    this.hidden.add(job.id);
    this.update(this.jobs);
  }
}

export function over(job) {
  return ["done", "failed", "cancelled"].includes(job.state);
}

function headline(job) {
  if (job.undone) return `${job.title}: undone, what was written is deleted`;
  if (job.state === "waiting") return `${job.title}: waits for its turn`;
  if (job.state === "running") return `${job.title}: ${job.text || "begins"}${job.total > 1 ? ` (${job.done} of ${job.total})` : " …"}`;
  const ends = { cancelled: "cancelled", failed: "failed", done: "done" };
  const { results, failed: failures } = job.counts;
  const saved = job.kind === "shrink" && results ? `, ${sizeText(job.bytes_before)} became ${sizeText(job.bytes_after)}` : "";
  const failed = failures ? `, ${countText(failures, "LoRA")} failed` : "";
  return `${job.title}: ${ends[job.state]}${saved}${failed}`;
}

function results(job) {
  const rows = job.results.map((result) =>
    el("tr", {},
      el("th", { scope: "row", className: "text name" }, result.name),
      el("td", {}, sizeText(result.bytes_before)),
      el("td", {}, sizeText(result.bytes_after)),
      el("td", {}, percentText(result.bytes_after / result.bytes_before)),
      el("td", {}, result.predicted_db ? decibelText(result.predicted_db) : `error ${percentText(result.error)}`),
      el("td", { className: "text path" }, job.undone ? "deleted" : [result.output, " ",
        result.output_id ? el("a", { href: address(`files/${result.output_id}`), download: result.output_name, "aria-label": `Download ${result.output_name}` }, "Download") : null]),
    ));
  return el("div", { className: "scroll", role: "region", tabIndex: 0, "aria-label": "Results" },
    el("table", {},
      el("caption", { className: "hidden" }, job.title),
      el("thead", {}, el("tr", {}, ...["LoRA", "before", "after", "share", "quality", "written to"].map((head, index) =>
        el("th", { scope: "col", className: index === 0 || index === 5 ? "text" : "" }, head)))),
      el("tbody", {}, rows)));
}
