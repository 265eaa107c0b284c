// Requests to the server. Every error is a Problem whose message is the `detail` that the server sent.

export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const TOKEN = "retrieval-tip token"; // name of the token in the storage of this tab

const COMPUTING = 202; // status while the result is being computed
const UNREACHED = -1; // status of a problem if the server does not answer

const BYTES = 30_000_000; // size of the photos in a request, of which servers accept 32 MiB by default
const PATIENCE = 120_000; // ms during which a request to a busy server is repeated

/** Wait for some milliseconds, or until the signal aborts. */
export const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

export const printed = { by: "retrieval-tip serve" }; // the command that has printed the token

async function problemOf(response) {
  printed.by = /realm="(.*)"/.exec(response.headers.get("WWW-Authenticate"))?.[1] ?? printed.by;
  const detail = (await response.json().catch(() => null))?.detail; // a proxy may not send JSON
  return new Problem(typeof detail === "string" ? detail : `HTTP ${response.status} ${response.statusText}`, response.status);
}

async function reached(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached. Is it still running?", UNREACHED);
  }
}

/** Fetch JSON, with the token if it is known. While a problem is `passing`, call `waiting(problem)`, and try again. */
export async function request(path, { waiting, signal, patience = PATIENCE, ...options } = {}) {
  const token = sessionStorage.getItem(TOKEN);
  // headers cannot contain characters that are not printable ASCII, and no token does
  const headers = { ...(token && { Authorization: `Bearer ${token.replace(/[^\x20-\x7e]/g, "?")}` }), ...options.headers };
  const until = Date.now() + patience;
  for (;;) {
    const response = await reached(path, { ...options, headers, signal });
    if (response.ok && response.status !== COMPUTING) return response.json();
    const problem = await problemOf(response);
    const told = Number(response.headers.get("Retry-After") ?? NaN); // a proxy may send a date, or nothing
    const seconds = told >= 0 ? told : 2;
    if (!passing(problem) || Date.now() + 1000 * seconds > until) throw problem;
    waiting?.(problem);
    await pause(Math.max(200, 1000 * seconds), signal);
  }
}

/** Return whether the same request may succeed later, because the server did not answer or was busy. */
export const passing = ({ status }) => [UNREACHED, COMPUTING, 429, 503].includes(status);

/** Return a line to show while a request to a busy server is repeated. */
export function retrying({ message }) {
  const [reason] = message.split("; try again");
  return `${reason.charAt(0).toUpperCase()}${reason.slice(1)}. Trying again…`;
}

/** Return the path of an index, or of something in it. */
export const at = (name, what = "") => `/v1/indexes/${encodeURIComponent(name)}${what}`;

export function query(parameters) {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of [value].flat()) if (one !== undefined && one !== "") given.append(name, one);
  }
  return given.size ? `?${given}` : "";
}

export const json = (body, method = "POST") => ({ method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** Return a request with a form, given as [name, text or file] pairs. */
export function form(pairs) {
  const body = new FormData();
  for (const pair of pairs) body.append(...pair);
  return { method: "POST", body };
}

/** Split [name, file] pairs into parts that fit into one request each. */
export function parts(pairs, most) {
  const found = [];
  let room = -1;
  for (const pair of pairs) {
    room -= pair[1].size;
    if (room < 0 || found.at(-1).length === most) {
      found.push([]);
      room = BYTES - pair[1].size;
    }
    found.at(-1).push(pair);
  }
  return found;
}

/** Return a request with features as binary numbers, because there may be thousands. */
export function floats(features) {
  const [{ length }] = features;
  const body = new Float32Array(features.length * length);
  features.forEach((row, i) => body.set(row, i * length));
  return { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body };
}

export const labelPhoto = (photo, what = "image") => `/v1/label/photos/${photo}/${what}`;
export const pictureOf = (name, keyId) => at(name, `/keys/${keyId}/image`);

/** Fetch something that is not JSON. */
export async function bytes(path) {
  const response = await reached(path);
  if (!response.ok) throw await problemOf(response);
  return response;
}

const lines = Array(4).fill(Promise.resolve()); // photos wait in these, so that other requests have connections
let turn = 0;

/** Classify an image in a form, or the features of earlier answers. */
export function classify(sent, parameters, options) {
  const work = () => {
    options.signal.throwIfAborted();
    return request(`/v1/classify${query(parameters)}`, { ...options, ...sent });
  };
  turn = (turn + 1) % lines.length;
  return (lines[turn] = lines[turn].then(work, work));
}
