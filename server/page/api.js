// What the page asks of the server: the model, an answer as a stream, a glance at the metrics.

import { settings } from "./settings.js";

function headers() {
  return settings.key ? { Authorization: `Bearer ${settings.key}` } : {};
}

/** The server's own words, with the status of its answer and OpenAI's code of the error. */
export class Failure extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }

  /** Whether it is the request itself that cannot be answered: asked again as it is, it would fail again. */
  get isRefusal() {
    return [400, 413, 422].includes(this.status);
  }
}

async function failure(response) {
  let message = `${response.status} ${response.statusText}`, code = null;
  try {
    const { error } = await response.json();
    message = error.message ?? message;
    code = error.code ?? null;
  } catch { /* no JSON: the status must do */ }
  if (response.status === 401) message += ". The key is one of the settings (⚙).";
  return new Failure(message, response.status, code);
}

/** {id, max_model_len} of the model that is served. */
export async function model() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data[0];
}

/** What goes on while there is no model: {status, what, done, total, error}. */
export async function health() {
  return (await fetch("/health")).json();
}

/** {running, waiting, cache} or null where the metrics are not to be had. */
export async function glance() {
  const response = await fetch("/metrics", { headers: headers() });
  if (response.status === 401) throw await failure(response);
  if (!response.ok) return null;
  const text = await response.text();
  const value = (name) => {
    const found = new RegExp(`^[a-z]+:${name}(?:\\{[^}]*\\})? (\\S+)$`, "m").exec(text);
    return found ? Number(found[1]) : null;
  };
  const running = value("num_requests_running");
  return running === null ? null : { running, waiting: value("num_requests_waiting"), cache: value("kv_cache_usage_perc") };
}

/**
 * One answer: yields {text, reasoning, finish, usage}, each field only where there is news. Aborting the signal ends it, and
 * frees what it holds on the server.
 */
export async function* answer(messages, signal) {
  const body = { model: "default", messages, stream: true, stream_options: { include_usage: true } };
  if (settings.temperature !== null) body.temperature = settings.temperature;
  if (settings.maxTokens !== null) body.max_completion_tokens = settings.maxTokens;
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await failure(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Failure(event.error.message, null, event.error.code);
    const choice = event.choices?.[0];
    yield {
      text: choice?.delta?.content ?? "",
      reasoning: choice?.delta?.reasoning_content ?? "",
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    };
  }
  throw new Error("The connection ended before the answer did.");
}

// The data of each Server-Sent Event; comments (heartbeats) are left out.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      waiting += value;
      let end;
      while ((end = waiting.indexOf("\n\n")) >= 0) {
        const block = waiting.slice(0, end);
        waiting = waiting.slice(end + 2);
        if (block.startsWith("data: ")) yield block.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
