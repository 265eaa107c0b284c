// The server's HTTP contract. Every error is a Problem whose message is the server's own `detail`.

export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const PATIENCE = 120_000; // ms that a busy server is asked again, as it says when

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

async function problemOf(response) {
  let detail;
  try {
    detail = (await response.json()).detail;
  } catch {
    // no JSON: not from this server, but from something before it
  }
  return new Problem(
    typeof detail === "string" ? detail : `HTTP ${response.status} ${response.statusText}`,
    response.status,
  );
}

/** JSON of a path. 429 and 503 are asked again after Retry-After; `waiting(problem)` hears of it. */
async function request(path, { waiting, signal, ...options } = {}) {
  const until = Date.now() + PATIENCE;
  for (;;) {
    let response;
    try {
      response = await fetch(path, { ...options, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached. Is it still running?");
    }
    if (response.ok) return response.json();
    const problem = await problemOf(response);
    const seconds = Number(response.headers.get("Retry-After") ?? NaN);
    if (![429, 503].includes(response.status) || !(seconds >= 0) || Date.now() + 1000 * seconds > until) throw problem;
    waiting?.(problem);
    await pause(Math.max(200, 1000 * seconds), signal);
  }
}

/** At most so many at once; the others wait in line. */
function limited(number) {
  let running = 0;
  const line = [];
  return async (work) => {
    if (running < number) running++;
    else await new Promise((resolve) => line.push(resolve)); // whoever is done hands over its place
    try {
      return await work();
    } finally {
      if (line.length) line.shift()();
      else running--;
    }
  };
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
const json = (body) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
});

export const indexes = () => request("/v1/indexes").then((found) => found.indexes);
export const index = (name) => request(at(name));
export const keys = (name, parameters, options) => request(`${at(name)}/keys${query(parameters)}`, options);
export const map = (name, method, options) => request(`${at(name)}/map${query({ method })}`, options);
export const audit = (name, options) => request(`${at(name)}/audit`, options);
export const pictureOf = (name, keyId) => `${at(name)}/keys/${keyId}/image`;

/** One image, its bytes as they are. */
export function classifyFile(file, parameters, options) {
  return asking(() => {
    options.signal?.throwIfAborted();
    const body = new FormData();
    body.append("images", file, file.name);
    return request(`/v1/classify${query(parameters)}`, { ...options, method: "POST", body });
  });
}

/** Features that earlier answers gave: the same images again, without the images. */
export const classifyFeatures = (features, inputs, parameters, options) =>
  asking(() => {
    options.signal?.throwIfAborted();
    return request(`/v1/classify${query(parameters)}`, { ...options, ...json({ features, inputs }) });
  });

export function addShot(name, label, file, token) {
  const body = new FormData();
  body.append("label", label);
  body.append("images", file, file.name);
  return request(`${at(name)}/keys`, { method: "POST", body, headers: { Authorization: `Bearer ${token}` } });
}

export const removeShots = (name, keyIds, token) =>
  request(`${at(name)}/keys${query({ key_id: keyIds })}`, {
    method: "DELETE",
    headers: { Authorization: `Bearer ${token}` },
  });
