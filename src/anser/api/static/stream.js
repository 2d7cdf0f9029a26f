// One streamed answer of /v1/chat/completions, chunk by chunk.
//
// Server-sent events as WHATWG defines them, as far as the API sends them: `data:` lines, comments
// to stay alive, a blank line after each event. What is held is bounded. A failure in mid-stream is
// an event with `error`; an end without `[DONE]` is a broken connection, never a complete answer.

const EVENT_CHARS_MAX = 1024 * 1024;

/** Why there is no (complete) answer: `code` as the API names it, `message` for people. */
export class Refusal extends Error {
  constructor(code, message = "") {
    super(message);
    this.code = code;
  }
}

/** Ask, and yield {chunk} for each piece; the first thing yielded is {headers}. */
export async function* ask({ body, key, signal }) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch("/v1/chat/completions", {
      method: "POST",
      headers,
      body: JSON.stringify(body),
      signal,
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Refusal("unreachable");
  }
  if (!answer.ok) throw await refusalOf(answer);
  yield { headers: answer.headers };
  for await (const data of events(answer.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.code, chunk.error.message);
    yield { chunk };
  }
  throw new Refusal("broken_off");
}

async function refusalOf(answer) {
  try {
    const { error } = await answer.json();
    return new Refusal(error.code, error.message);
  } catch {
    return new Refusal("refused", `HTTP ${answer.status}`);
  }
}

/** The data of each event in a stream of bytes. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await read(reader, signal);
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      if (rest.length > EVENT_CHARS_MAX) throw new Refusal("broken_off");
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        }
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Refusal("broken_off");
  }
}
