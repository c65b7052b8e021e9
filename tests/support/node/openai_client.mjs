// What users of OpenAI's package for Node do, against a server; prints what came as one JSON object.
//
//   NODE_PATH=FOLDER node openai_client.mjs URL MODEL

import { createRequire } from "node:module";

const { OpenAI } = createRequire(`${process.env.NODE_PATH}/`)("openai");
const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });

const budget = { latency_ms: 600000 };
const messages = [{ role: "user", content: "Ada is 36 and a user." }];
const schema = {
  type: "object",
  properties: {
    name: { type: "string", maxLength: 8 },
    age: { type: "integer", minimum: 0, maximum: 150 },
    role: { enum: ["admin", "user"] },
  },
  required: ["name", "age", "role"],
  additionalProperties: false,
};
const tool = { type: "function", function: { name: "save", parameters: schema, strict: true } };
const flat = { type: "function", name: "save", parameters: schema, strict: true };
const fields = { model, messages, seed: 7, max_tokens: 100, budget };
const asked = { model, input: "Ada is 36 and a user.", seed: 7, max_output_tokens: 100, budget };

async function textOf(stream) {
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  return text;
}

const found = {};

found.models = (await client.models.list()).data.map((entry) => entry.id);

const chat = await client.chat.completions.create({ ...fields, max_tokens: 12 });
found.chat = chat.choices[0].message.content;
found.exit = chat.budget.exit_layer;

found.streamed = await textOf(
  await client.chat.completions.create({ ...fields, max_tokens: 12, stream: true }),
);

const response_format = { type: "json_schema", json_schema: { name: "person", schema, strict: true } };
const parsed = await client.chat.completions.parse({ ...fields, response_format });
found.parsed = parsed.choices[0].message.parsed;

const tools = { tools: [tool], tool_choice: "required", parallel_tool_calls: false };
const called = await client.chat.completions.create({ ...fields, ...tools });
found.call = JSON.parse(called.choices[0].message.tool_calls[0].function.arguments);
found.reason = called.choices[0].finish_reason;

const runner = client.chat.completions.stream({ ...fields, ...tools });
found.streamedCall = JSON.parse(
  (await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function.arguments,
);

const allowed = { type: "allowed_tools", allowed_tools: { mode: "required", tools: [tool] } };
const narrowed = await client.chat.completions.create({ ...fields, ...tools, tool_choice: allowed });
found.allowed = narrowed.choices[0].message.tool_calls.map((call) => call.function.name);

const later = await client.chat.completions.create({
  ...fields,
  max_tokens: 4,
  messages: [
    ...messages,
    called.choices[0].message,
    { role: "tool", tool_call_id: called.choices[0].message.tool_calls[0].id, content: "saved" },
  ],
});
found.later = later.choices[0].finish_reason;

const response = await client.responses.create({ ...asked, max_output_tokens: 12 });
found.response = response.output_text;

const format = { type: "json_schema", name: "person", schema, strict: true };
const structured = await client.responses.parse({ ...asked, text: { format } });
found.responseParsed = structured.output_parsed;

const forced = { tools: [flat], tool_choice: "required", parallel_tool_calls: false };
const stream = client.responses.stream({ ...asked, ...forced });
const kinds = new Set();
stream.on("event", (event) => kinds.add(event.type));
const whole = await stream.finalResponse();
found.responseCall = JSON.parse(whole.output[0].arguments);
found.kinds = [...kinds].sort();

const after = await client.responses.create({
  ...asked,
  max_output_tokens: 4,
  input: [
    { role: "user", content: "Save Ada." },
    ...whole.output,
    { type: "function_call_output", call_id: whole.output[0].call_id, output: "saved" },
  ],
});
found.after = after.status;

try {
  await client.chat.completions.create({ ...fields, budget: { exit_layer: 99 } });
} catch (error) {
  found.refused = [error.status, error.param];
}

console.log(JSON.stringify(found));
