// The page: asks the server what changed, and passes it on.

import { get, post, Refused, Unreachable, upload } from "./api.js";
import { AdapterView, QUALITIES } from "./adapter.js";
import { byId, el } from "./dom.js";
import { JobsView } from "./jobs.js";
import { LibraryView } from "./library.js";

const [BUSY, CALM] = [400, 2500]; // milliseconds between questions

let since = 0;
let run = "";
let timer;
let open = "";

const library = new LibraryView({ open: (id) => (location.hash = `#${id}`), tick: () => {} });
const adapter = new AdapterView({
  close: () => (location.hash = ""),
  started: () => refresh(),
});
const jobs = new JobsView({ changed: () => refresh() });

async function refresh() {
  clearTimeout(timer);
  try {
    let state = await get("state", { since });
    if (run && state.run !== run) {
      library.clear();
      state = await get("state", { since: 0 });
    }
    [run, since] = [state.run, state.library.revision];
    library.update(state.library, state.folders);
    jobs.update(state.jobs);
    adapter.pictures?.update(state.jobs);
    say("");
    route();
  } catch (error) {
    if (error instanceof Unreachable) {
      say("lorashrink is not running any more. Start it again with “lorashrink ui”, and this page goes on by itself.");
    } else if (error instanceof Refused && error.status === 401) {
      say("This page belongs to a lorashrink that was stopped. Open the address that lorashrink ui printed when it started.");
    } else if (error instanceof Refused) say(error.message);
    else throw error;
  } finally {
    const busy = jobs.busy || library.unread > 0 || library.waiting;
    timer = setTimeout(refresh, document.hidden ? CALM * 2 : busy ? BUSY : CALM);
  }
}

function say(text) {
  const banner = byId("banner");
  if (banner.textContent !== text) banner.textContent = text;
  banner.hidden = text === "";
}

// The address names the LoRA that is open, so that Back and reloading do what they should.
function route() {
  const id = location.hash.slice(1);
  if (id === open || (id && !library.rows.has(id))) return;
  open = id;
  document.body.classList.toggle("opened", id !== "");
  library.choose(id);
  if (id) adapter.open(id);
  else {
    const before = adapter.id;
    adapter.leave();
    const index = library.shown.findIndex((row) => row.id === before);
    if (index >= 0) library.focusRow(index);
  }
}

addEventListener("hashchange", route);
addEventListener("visibilitychange", () => document.hidden || refresh());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && open) location.hash = "";
});

// --- several at once ------------------------------------------------------------------------------

byId("ticked-quality").append(...Object.entries(QUALITIES).map(([value, text]) => el("option", { value, selected: value === "high" }, text)));
byId("ticked-shrink").addEventListener("click", async () => {
  const ids = [...library.ticked];
  await act(() => post("shrink", { ids, by: "quality", value: byId("ticked-quality").value }));
  library.ticked.clear();
  library.filter();
});
byId("ticked-none").addEventListener("click", () => {
  library.ticked.clear();
  library.filter();
});
byId("rescan").addEventListener("click", () => act(() => post("rescan")));

async function act(call) {
  try {
    const result = await call();
    await refresh();
    return result;
  } catch (error) {
    if (!(error instanceof Refused) && !(error instanceof Unreachable)) throw error;
    say(error.message);
    return null;
  }
}

// --- files that are dropped -----------------------------------------------------------------------

async function add(files) {
  for (const file of files) {
    const present = [...library.rows.values()].find((row) => row.name === file.name && row.bytes === file.size);
    if (present) {
      location.hash = `#${present.id}`;
      continue;
    }
    say(`Reading ${file.name} …`);
    const answer = await act(() => upload(file));
    if (answer) location.hash = `#${answer.id}`;
  }
}

let depth = 0;
const isFile = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => isFile(event) && showDrop(++depth));
addEventListener("dragleave", (event) => isFile(event) && showDrop(--depth));
addEventListener("dragover", (event) => isFile(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!isFile(event)) return;
  event.preventDefault();
  showDrop((depth = 0));
  add(event.dataTransfer.files);
});

function showDrop(count) {
  byId("drop").hidden = count <= 0;
}

byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", (event) => {
  add([...event.target.files]);
  event.target.value = "";
});

refresh();
