// Numbers and names as text, as the command line prints them.

const UNPRINTABLE = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]/g;

// Escapes for what could turn a line around or hide a part of it.
export function printable(text) {
  const paired = text.match(/[\ud800-\udbff][\udc00-\udfff]|[^]/g) ?? [];
  return paired
    .map((character) => (character.length === 2 ? character : character.replace(UNPRINTABLE, escaped)))
    .join("");
}

function escaped(character) {
  return `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
}

export function sizeText(bytes) {
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(1)} kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}

// Sizes that move with a slider need a digit more.
export function fineSizeText(bytes) {
  return bytes < 1e7 && bytes >= 1e6 ? `${(bytes / 1e6).toFixed(2)} MB` : sizeText(bytes);
}

export function percentText(share) {
  const percent = 100 * share;
  return `${percent === 0 ? "0" : percent < 9.95 ? Number(percent.toPrecision(2)) : Math.round(percent)} %`;
}

export function countText(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

export function decibelText(decibels) {
  return `about ${Math.round(decibels)} dB`;
}

// What a PSNR of pictures means; the steps are those of the qualities.
export function pictureMeaning(decibels) {
  if (decibels >= 49.5) return "pictures should look the same";
  if (decibels >= 39.5) return "differences are hard to see";
  if (decibels >= 32.5) return "small differences";
  return decibels >= 26.5 ? "visible differences" : "much of it is lost";
}

// What an error of the weights means for pictures, as far as that can be said without drawing any.
export function errorMeaning(error) {
  if (error <= 0.035) return "pictures should look the same";
  if (error <= 0.12) return "differences are hard to see";
  if (error <= 0.25) return "small differences";
  return error <= 0.45 ? "visible differences" : "much of it is lost";
}
