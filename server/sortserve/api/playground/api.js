// What the page asks of the server: JSON, and streams of tokens. Addresses are relative to the page,
// so that a proxy's prefix may stand before them.

const KEY = "sortserve.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  },
};

/** An error in the API's own words. */
export class ApiError extends Error {
  constructor(status, error, retryAfter) {
    super(error.message);
    this.status = status; // 0: no answer came; 200: the stream broke after it began
    this.param = error.param ?? null;
    this.code = error.code ?? error.type ?? null;
    this.retryAfter = retryAfter;
  }
}

export const address = (path) => new URL(path, document.baseURI).href;

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new ApiError(0, { message: `No answer came from ${address(path)}.` }, null);
  }
  if (reply.ok) return reply;
  throw new ApiError(reply.status, await errorOf(reply), reply.headers.get("Retry-After"));
}

async function errorOf(reply) {
  const text = await reply.text();
  try {
    return JSON.parse(text).error;
  } catch {
    return { message: text || reply.statusText }; // a proxy's page, not the API's words
  }
}

/** Whether there is such a page here. */
export async function isThere(path) {
  return (await fetch(path, { method: "HEAD" })).ok;
}

export async function get(path) {
  return (await request(path)).json();
}

/**
 * Send a request that streams; calls `onStart` with the reply's headers and `onEvent` with each event.
 * Throws an ApiError, also for an error that comes inside the stream, or the AbortError of `signal`.
 */
export async function stream(body, { signal, onStart, onEvent }) {
  const reply = await request("generate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  onStart(reply.headers);
  for await (const data of messages(reply.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(reply.status, event.error, null);
    onEvent(event);
  }
  throw new ApiError(reply.status, { message: "The stream ended before the answer did." }, null);
}

async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
