// The request that the page would send, as a command and as a program.

import { address, key } from "./api.js";

const INDENT = "    ";

export function curl(body) {
  const quoted = JSON.stringify({ ...body, stream: true }, null, 2).replaceAll("'", "'\\''");
  const lines = [
    `curl -N ${address("generate")}`,
    "-H 'Content-Type: application/json'",
    ...(key.get() ? ['-H "Authorization: Bearer $SORTSERVE_API_KEY"'] : []),
    `-d '${quoted}'`,
  ];
  return lines.join(" \\\n  ");
}

export function python(body) {
  const { budget, ...rest } = body;
  const url = pythonValue(address(".").replace(/\/$/, ""));
  const withKey = key.get() ? ', api_key=os.environ["SORTSERVE_API_KEY"]' : "";
  const fields = Object.entries(rest).map(([name, value]) => `${name}=${pythonValue(value, 1)},`);
  if (budget) {
    const parts = Object.entries(budget).map(([name, value]) => `${name}=${pythonValue(value)}`);
    fields.push(`budget=Budget(${parts.join(", ")}),`);
  }
  return [
    ...(key.get() ? ["import os", ""] : []),
    `from sortserve_client import ${budget ? "Budget, " : ""}Client  # pip install sortserve`,
    "",
    `client = Client(${url}${withKey})`,
    "with client.stream(",
    ...fields.map((field) => INDENT + field),
    ") as stream:",
    `${INDENT}for event in stream:`,
    `${INDENT.repeat(2)}print(event.text, end="", flush=True)`,
    `${INDENT}print(stream.result().budget)`,
    "",
  ].join("\n");
}

function pythonValue(value, depth = 0) {
  if (Array.isArray(value) && value.some((item) => typeof item === "object" && !Array.isArray(item))) {
    const pad = INDENT.repeat(depth + 1);
    const items = value.map((item) => `${pad}${pythonValue(item)},\n`);
    return `[\n${items.join("")}${INDENT.repeat(depth)}]`;
  }
  if (Array.isArray(value)) return `[${value.map((item) => pythonValue(item)).join(", ")}]`;
  if (value !== null && typeof value === "object") {
    const items = Object.entries(value).map(([k, v]) => `${pythonValue(k)}: ${pythonValue(v)}`);
    return `{${items.join(", ")}}`;
  }
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  return JSON.stringify(value); // numbers and texts are written alike in both
}
