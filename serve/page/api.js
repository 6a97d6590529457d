// The server's interface: JSON, the stream of a canvas, and the key.

const KEY = "dlm-key";

/** An error with words for the reader; status 0 when the server could not be reached. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }

  /** True when nobody answered, or the answer broke off. */
  get gone() {
    return this.status === 0;
  }
}

/** Keep the key for this tab alone. */
export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** True when a key has been given in this tab. */
export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

/** The JSON at a path. */
export async function getJSON(path) {
  return (await request(path, {})).json();
}

/** True when the server answers requests, "loading" and the like when it soon will, false when it is gone. */
export async function readiness() {
  try {
    const response = await fetch("ready", { cache: "no-store", signal: AbortSignal.timeout(4000) });
    return response.ok || (await response.json()).status;
  } catch {
    return false;
  }
}

/**
 * The events of /v1/canvas: `{ name, data }`.
 * @param {object} body of the request
 * @param {AbortSignal} signal closes the connection, whereupon the server frees the row
 */
export async function* canvasEvents(body, signal) {
  const response = await request("v1/canvas", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const block of blocks(response.body)) {
    const event = parsed(block);
    if (event.name === "error") throw new ServerError(event.data.error.message, 500);
    if (event.data) yield event;
  }
}

async function request(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (hasKey()) headers.Authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (!response.ok) throw new ServerError(await messageOf(response), response.status);
  return response;
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** Blocks of a stream of events, which are parted by empty lines. */
async function* blocks(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  const event = { name: "message", data: null };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event.name = line.slice(7);
    if (line.startsWith("data: ")) event.data = JSON.parse(line.slice(6));
  }
  return event;
}
