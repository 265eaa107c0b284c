// Requests to the server. Every error is a Problem whose message is the `detail` that the server sent.

export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const TOKEN = "retrieval-tip token"; // name of the token in the storage of this tab

const COMPUTING = 202; // status while the result is being computed
export const UNREACHED = -1; // status of a problem if the server does not answer

const PATIENCE = 120_000; // ms during which a request to a busy server is repeated

/** Wait for some milliseconds, or until the signal aborts. */
export const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

async function problemOf(response) {
  let detail;
  try {
    detail = (await response.json()).detail;
  } catch {
    // the response is not JSON, so it comes from a proxy
  }
  return new Problem(
    typeof detail === "string" ? detail : `HTTP ${response.status} ${response.statusText}`,
    response.status,
  );
}

/** Fetch JSON, with the token if it is known. After status 202, 429 or 503, call `waiting(problem)`, wait for the time
 *  in Retry-After, or for two seconds, and try again. */
async function request(path, { waiting, signal, patience = PATIENCE, ...options } = {}) {
  const token = sessionStorage.getItem(TOKEN);
  // headers cannot contain characters that are not printable ASCII, and no token does
  const headers = { ...(token && { Authorization: `Bearer ${token.replace(/[^\x20-\x7e]/g, "?")}` }), ...options.headers };
  const until = Date.now() + patience;
  for (;;) {
    let response;
    try {
      response = await fetch(path, { ...options, headers, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached. Is it still running?", UNREACHED);
    }
    if (response.ok && response.status !== COMPUTING) return response.json();
    const problem = await problemOf(response);
    const told = Number(response.headers.get("Retry-After") ?? NaN); // a proxy may send a date, or nothing
    const seconds = told >= 0 ? told : 2;
    if (!passing(problem) || Date.now() + 1000 * seconds > until) throw problem;
    waiting?.(problem);
    await pause(Math.max(200, 1000 * seconds), signal);
  }
}

/** Return a function that runs at most `number` calls at once. Further calls wait in a queue. */
function limited(number) {
  let running = 0;
  const line = [];
  return async (work) => {
    if (running < number) running++;
    else await new Promise((resolve) => line.push(resolve)); // a finished call passes its place on
    try {
      return await work();
    } finally {
      if (line.length) line.shift()();
      else running--;
    }
  };
}

/** Return whether the same request may succeed later, because the server did not answer or was busy. */
export const passing = ({ status }) => [UNREACHED, COMPUTING, 429, 503].includes(status);

/** Return a line to show while a request to a busy server is repeated. */
export function retrying({ message }) {
  const [reason] = message.split("; try again");
  return `${reason.charAt(0).toUpperCase()}${reason.slice(1)}. Trying again…`;
}

const asking = limited(4);
const at = (name) => `/v1/indexes/${encodeURIComponent(name)}`;
const query = (parameters) => {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value])
      if (one !== undefined && one !== "") given.append(name, one);
  }
  return `?${given}`;
};
const json = (body, method = "POST") => ({ method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export const indexes = () => request("/v1/indexes");
export const index = (name) => request(at(name));
export const keys = (name, parameters, options) => request(`${at(name)}/keys${query(parameters)}`, options);
export const map = (name, method, limit, options) => request(`${at(name)}/map${query({ method, limit })}`, options);
export const audit = (name, parameters, options) => request(`${at(name)}/audit${query(parameters)}`, options);
export const accuracy = (name) => request(`${at(name)}/accuracy`);
export const exemplars = (name) => request(`${at(name)}/exemplars`);
export const history = (name) => request(`${at(name)}/history`);
export const labelling = () => request("/v1/label");
export const labelPhoto = (photo) => `/v1/label/photos/${photo}/image`;
export const pictureOf = (name, keyId) => `${at(name)}/keys/${keyId}/image`;

/** Classify an image file. */
export function classifyFile(file, parameters, options) {
  return asking(() => {
    options.signal?.throwIfAborted();
    const body = new FormData();
    body.append("images", file, file.name);
    return request(`/v1/classify${query(parameters)}`, { ...options, method: "POST", body });
  });
}

/** Return a request with features as binary numbers, because there may be thousands. */
function floats(features) {
  const [{ length }] = features;
  const body = new Float32Array(features.length * length);
  features.forEach((row, i) => body.set(row, i * length));
  return { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body };
}

/** Classify images again, using the features in earlier answers. */
export const classifyFeatures = (features, parameters, options) =>
  asking(() => {
    options.signal?.throwIfAborted();
    return request(`/v1/classify${query(parameters)}`, { ...options, ...floats(features) });
  });

/** Group similar features. */
export const groups = (name, features) => request(`${at(name)}/groups`, floats(features));

/** Add photos as examples of one class. */
export function addShots(name, label, files) {
  const body = new FormData();
  body.append("label", label);
  for (const file of files) body.append("images", file, file.name);
  return request(`${at(name)}/keys`, { method: "POST", body });
}

/** Create an index from [label, file] pairs, and fit it. */
export function makeIndex(name, like, pairs) {
  const body = new FormData();
  body.append("name", name);
  for (const [label, file] of pairs) {
    body.append("label", label);
    body.append("images", file, file.name);
  }
  return request(`/v1/indexes${query({ like })}`, { method: "POST", body });
}

export const renameIndex = (name, to) => request(at(name), json({ name: to }, "PATCH"));
export const duplicateIndex = (name, to) => request(`${at(name)}/duplicate`, json({ name: to }));
export const deleteIndex = (name) => request(at(name), { method: "DELETE" });
export const fit = (name) => request(`${at(name)}/fit`, { method: "POST" });
export const removeShots = (name, keyIds) => request(`${at(name)}/keys${query({ key_id: keyIds })}`, { method: "DELETE" });
export const relabel = (name, change) => request(`${at(name)}/relabel`, json(change));
export const rename = (name, change) => request(`${at(name)}/rename`, json(change));
export const rollback = (name, change) => request(`${at(name)}/rollback`, json(change));
/** Set or remove labels in the labelling session, or skip photos, and return the new state of the session. */
export const setLabels = (change) => request("/v1/label", { ...json(change), patience: 0 });
/** Copy all photos of the labelling session into folders by class. */
export const sortPhotos = (into) => request("/v1/label/sort", json({ into }));
