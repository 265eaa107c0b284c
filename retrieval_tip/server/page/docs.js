// A readable view of /openapi.json.

import { reached } from "./api.js";
import { $, attempt, el } from "./dom.js";

const quoted = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;

function command(path, method, { parameters = [], requestBody }) {
  const secret = parameters.some(({ name }) => name === "authorization");
  const needed = parameters.filter((one) => one.in === "query" && one.required).map(({ name }) => `${name}=1`);
  const parts = ["curl"];
  if (method !== "get") parts.push("-X", method.toUpperCase());
  if (secret) parts.push("-H", quoted("Authorization: Bearer TOKEN"));
  const content = requestBody?.content ?? {};
  const form = content["multipart/form-data"]?.schema;
  const [kind] = Object.keys(content);
  if (form) for (const name of form.required ?? []) parts.push("-F", name === "images" ? "images=@photo.jpg" : quoted(`${name}=${name.toUpperCase()}`));
  else if (kind) parts.push("-H", quoted(`Content-Type: ${kind}`), ...(kind === "text/csv" ? ["--data-binary", "@table.csv"] : ["-d", quoted("{...}")]));
  return [...parts, quoted(`${location.origin}${path}${needed.length ? `?${needed.join("&")}` : ""}`)].join(" ");
}

const kindOf = (schema = {}) => schema.type ?? schema.anyOf?.map(({ type }) => type).filter((type) => type !== "null").join(" or ") ?? "";

function operation(path, method, what, schemas) {
  const given = (what.parameters ?? []).filter(({ name }) => name !== "authorization");
  const body = Object.entries(what.requestBody?.content ?? {}).flatMap(([kind, { schema }]) => {
    const whole = schema.$ref ? schemas[schema.$ref.split("/").at(-1)] : schema;
    return Object.entries(whole.properties ?? {}).map(([name, one]) => ({ name, in: kind, schema: one, description: one.description, required: whole.required?.includes(name) }));
  });
  const rows = [...given, ...body].map(({ name, required, in: place, schema, description }) => {
    const cells = [place, kindOf(schema), description ?? schema?.description ?? ""].map((text) => el("td", {}, text));
    return el("tr", {}, el("th", { scope: "row" }, el("code", {}, name), required ? " *" : ""), ...cells);
  });
  return el(
    "section",
    { class: "operation" },
    el("h3", {}, el("span", { class: "method" }, method.toUpperCase()), el("code", {}, path)),
    el("p", {}, what.description),
    rows.length ? el("table", {}, el("tbody", {}, ...rows)) : null,
    el("pre", { tabIndex: 0 }, el("code", {}, command(path, method, what))),
    el("p", { class: "hint" }, `Responses: ${Object.keys(what.responses).join(", ")}`),
  );
}

attempt($("problem"), async () => {
  const { info, paths, components } = await (await reached("/openapi.json")).json();
  $("api-about").textContent = `${info.description} Version ${info.version}. Fields marked * are required.`;
  $("operations").replaceChildren(
    ...Object.entries(paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, what]) => operation(path, method, what, components.schemas)),
    ),
  );
});
