// The curve of size against error, with the size on a logarithmic axis that the slider below shares.

import { svg } from "./dom.js";
import { percentText, sizeText } from "./text.js";

const [WIDTH, HEIGHT] = [560, 220];
const EDGE = { left: 46, right: 12, top: 12, bottom: 30 };

export class Curve {
  // points: {bytes, error}, smallest first. least and most are the ends of the axis in bytes.
  constructor(points, least, most) {
    Object.assign(this, { points, least, most });
    this.worst = Math.max(0.05, ...points.map((point) => point.error));
    this.mark = svg("g", { class: "mark" });
    const path = points.map((point, index) => `${index ? "L" : "M"}${this.x(point.bytes)} ${this.y(point.error)}`).join("");
    this.element = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img", "aria-label": this.description() },
      ...this.grid(),
      svg("path", { d: path, class: "line" }),
      this.mark,
    );
  }

  description() {
    const [first, last] = [this.points[0], this.points.at(-1)];
    return (
      `Size against error of the weights: from ${percentText(first.error)} at ${sizeText(first.bytes)} ` +
      `to ${percentText(last.error)} at ${sizeText(last.bytes)}`
    );
  }

  // 0 to 1 along the axis, and back.
  share(bytes) {
    return Math.log(bytes / this.least) / Math.log(this.most / this.least);
  }

  bytes(share) {
    return this.least * (this.most / this.least) ** share;
  }

  x(bytes) {
    return EDGE.left + Math.min(1, Math.max(0, this.share(bytes))) * (WIDTH - EDGE.left - EDGE.right);
  }

  y(error) {
    return EDGE.top + (1 - error / this.worst) * (HEIGHT - EDGE.top - EDGE.bottom);
  }

  // The error at a size, between the points that are known.
  error(bytes) {
    const after = this.points.findIndex((point) => point.bytes >= bytes);
    if (after <= 0) return this.points[after < 0 ? this.points.length - 1 : 0].error;
    const [a, b] = [this.points[after - 1], this.points[after]];
    const share = Math.log(bytes / a.bytes) / Math.log(b.bytes / a.bytes);
    return a.error + share * (b.error - a.error);
  }

  moveTo(bytes, error) {
    const [x, y] = [this.x(bytes), this.y(error)];
    this.mark.replaceChildren(
      svg("line", { x1: x, x2: x, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
      svg("circle", { cx: x, cy: y, r: 6 }),
    );
  }

  *grid() {
    for (const error of ticks(this.worst)) {
      const y = this.y(error);
      yield svg("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y, y2: y });
      yield label(EDGE.left - 6, y + 4, percentText(error), "end");
    }
    const count = 5;
    for (let index = 0; index < count; index++) {
      const bytes = this.bytes(index / (count - 1));
      const anchor = index === 0 ? "start" : index === count - 1 ? "end" : "middle";
      yield label(this.x(bytes), HEIGHT - 10, sizeText(bytes), anchor);
    }
  }
}

function label(x, y, text, anchor) {
  const element = svg("text", { x, y, "text-anchor": anchor, "aria-hidden": "true" });
  element.textContent = text;
  return element;
}

function ticks(worst) {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((size) => worst / size <= 5) ?? 1;
  return Array.from({ length: Math.floor(worst / step) + 1 }, (_, index) => index * step);
}
