"use strict";

// Numbers before text, and cells without a value last, whichever way the table is sorted.
function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const [x, y] = [Number(a), Number(b)];
  return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y);
}

function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent;
}

function sort(header) {
  const table = header.closest("table");
  const falling = header.getAttribute("aria-sort") === "ascending";
  for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const column = header.cellIndex;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => compare(value(a, column), value(b, column), falling ? -1 : 1));
  table.tBodies[0].append(...rows);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}

const controls = document.getElementById("controls");
if (controls) {
  const rows = [...document.querySelectorAll("#layer-table tbody tr")];
  const inputs = ["words", "block", "kind"].map((name) => document.getElementById(name));
  const [words, block, kind] = inputs;
  const filter = () => {
    const terms = words.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden =
        !terms.every((term) => text.includes(term)) ||
        (block.value !== "" && row.dataset.block !== block.value) ||
        (kind.value !== "" && row.dataset.kind !== kind.value);
    }
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("count").textContent = `${shown} of ${rows.length} layers`;
  };
  controls.hidden = false;
  for (const input of inputs) input.addEventListener("input", filter);
  filter(); // a reloaded page may have kept what was typed
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((folded) => (folded.open = true)));

const panel = document.getElementById("compare");
if (panel) {
  const slider = panel.querySelector(".slider");
  const [before, after] = slider.querySelectorAll("img");
  const divider = document.getElementById("divider");
  const difference = document.getElementById("difference");
  const buttons = [...document.querySelectorAll(".sheet button")];

  const move = () => {
    slider.style.setProperty("--cut", `${divider.value}%`);
    divider.setAttribute("aria-valuetext", `original adapter up to ${divider.value} % of the width`);
  };
  const choose = (button) => {
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    const [chosen, whole] = [button.querySelector("img"), button.closest("tr").querySelector("img.whole")];
    [before.src, before.alt] = [whole.src, whole.alt];
    [after.src, after.alt] = [chosen.src, chosen.alt];
    for (const image of [before, after]) image.classList.toggle("speck", chosen.classList.contains("speck"));
    document.getElementById("compared").textContent = button.dataset.said;
    document.getElementById("compared-prompt").textContent = button.closest("tr").querySelector("th").textContent;
  };

  divider.addEventListener("input", move);
  difference.addEventListener("input", () => slider.classList.toggle("difference", difference.checked));
  for (const button of buttons) {
    button.addEventListener("click", () => {
      choose(button);
      divider.focus({ preventScroll: true });
      panel.scrollIntoView({ block: "nearest" });
    });
  }
  panel.hidden = false;
  move();
  choose(buttons.find((button) => button.dataset.first !== undefined) ?? buttons[0]);
}
