// The server's answers. The token comes with the address and leaves the address bar at once.

const query = new URLSearchParams(location.search);
if (query.has("token")) {
  sessionStorage.setItem("token", query.get("token"));
  history.replaceState(null, "", location.pathname + location.hash);
}
const token = sessionStorage.getItem("token") ?? "";

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export class Unreachable extends Error {}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, "X-Lorashrink-Token": token } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable(error.message);
  }
  const values = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return {}; // an answer without JSON, from something before the server
  });
  if (!response.ok) throw new Refused(values.error ?? `the server answered ${response.status}`, response.status);
  return values;
}

export function get(path, values = {}, signal = undefined) {
  const filled = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return ask(`/api/${path}?${new URLSearchParams(filled)}`, { signal });
}

export function post(path, values = {}) {
  return ask(`/api/${path}`, { method: "POST", body: JSON.stringify(values) });
}

export function upload(file) {
  return ask(`/api/upload?${new URLSearchParams({ name: file.name })}`, { method: "PUT", body: file });
}

// An address for links and pictures, which cannot send a header.
export function address(path) {
  return `/api/${path}?${new URLSearchParams({ token })}`;
}
