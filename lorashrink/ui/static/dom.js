// Elements from text only: no name, prompt or error can become markup.

import { printable } from "./text.js";

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, property] of Object.entries(properties)) {
    if (property === undefined || property === null || property === false) continue;
    const value = name === "title" || name === "aria-label" ? printable(property) : property;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.startsWith("aria-") && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false).map(text));
  return element;
}

function text(child) {
  return child instanceof Node ? child : printable(String(child));
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

// Calls that come in quick succession become one, after a pause.
export function debounced(call, milliseconds) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}
