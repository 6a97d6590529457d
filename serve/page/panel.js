// One answer by one decoder: its canvas, its frames, and its numbers.

import { ServerError, canvasEvents } from "./api.js";
import { CanvasView } from "./canvas.js";
import { make, plural, readable } from "./dom.js";
import { frameAt, frameOf, written } from "./frames.js";

/** A canvas and its frames. */
class Track {
  /** @param {string} label for those who hear the page */
  constructor(label) {
    this.frames = [];
    this.view = new CanvasView(label);
  }

  get last() {
    return this.frames.at(-1);
  }

  /** Take an event of the stream. */
  add(data) {
    this.frames.push(frameOf(data, this.last));
  }

  /** Take the finished canvas, in the place of frames that are not before it. */
  end(data) {
    this.frames = [...this.frames.filter((frame) => frame.step < data.step), frameOf(data)];
  }
}

const SHOWN = 8; // lengths of a gap whose canvases are shown while they are tried

/** What one decoder makes of a prompt: a canvas, or one for each length of a gap while they are tried. */
export class Panel {
  /**
   * @param {string} name of the decoder
   * @param {() => void} changed called when there is a new frame
   */
  constructor(name, changed) {
    this.name = name;
    this.changed = changed;
    this.tracks = new Map();
    this.answer = null;
    this.canvases = make("div", { class: "canvases" });
    this.facts = make("dl", { class: "facts" });
    this.problem = make("p", { class: "problem", role: "alert" });
    this.note = make("p", { class: "soft" });
    this.actions = make("div", { class: "row" });
    this.element = make(
      "section",
      { class: "panel", "aria-label": `Answer by ${name}` },
      make("div", { class: "row head" }, make("h3", { text: name }), this.actions),
      this.canvases,
      this.facts,
      this.note,
      this.problem,
    );
  }

  /** Steps so far. */
  get steps() {
    return Math.max(0, ...this.#all.map((track) => track.last.step));
  }

  /** Decode, and follow every step; raises when it is stopped or fails. */
  async run(body, signal) {
    const begun = performance.now();
    this.element.setAttribute("aria-busy", "true");
    try {
      for await (const { name, data } of canvasEvents(body, signal)) {
        if (name === "done") this.#finish(data, (performance.now() - begun) / 1000);
        else this.#add(data);
      }
      if (this.answer === null) throw new ServerError("The answer broke off.");
    } catch (error) {
      this.#fail(error);
      throw error;
    } finally {
      this.element.removeAttribute("aria-busy");
    }
  }

  /** Show the canvas as it was after a step. */
  show(step) {
    const shown = this.#all.filter((track) => track.view.element.parentNode);
    for (const track of shown) track.view.draw(frameAt(track.frames, step), this.steps);
  }

  get #all() {
    return [...this.tracks.values()];
  }

  /** The track of a length that is tried; there is but one where nothing is tried. */
  #track(candidate) {
    const number = candidate ?? 0;
    if (!this.tracks.has(number)) {
      const track = new Track(`Canvas of ${this.name}`);
      this.tracks.set(number, track);
      if (this.tracks.size <= SHOWN) this.canvases.append(track.view.element);
    }
    return this.tracks.get(number);
  }

  #add(data) {
    this.#track(data.candidate).add(data);
    const last = this.#all.map((track) => track.last);
    this.#list(
      last.reduce((sum, frame) => sum + frame.calls, 0),
      Math.max(...last.map(written)),
    );
    const rest = last.length > SHOWN ? ` The first ${SHOWN} are shown.` : "";
    if (last.length > 1) this.note.textContent = `${last.length} lengths are tried.${rest}`;
    this.changed();
  }

  #finish(data, seconds) {
    this.answer = data.text;
    const track = this.#track(data.candidate);
    track.end(data);
    const tried = this.tracks.size;
    if (tried > 1) {
      this.note.textContent = `${tried} lengths were tried. This is the likeliest.`;
      this.tracks = new Map([[0, track]]);
      this.canvases.replaceChildren(track.view.element);
    }
    const tokens = data.usage.completion_tokens;
    const perCall = readable(tokens / Math.max(1, data.model_calls));
    const rates = { "tokens per call": perCall, "tokens per second": readable(tokens / seconds) };
    this.#list(data.model_calls, tokens, rates);
    this.actions.append(copyButton(data.text));
    this.changed();
  }

  #fail(error) {
    const stopped = error.name === "AbortError";
    this.problem.textContent = stopped ? "" : error.message;
    if (stopped) this.note.textContent = "Stopped. The conversation goes on without this answer.";
  }

  #list(calls, tokens, rates = {}) {
    const facts = { [plural(calls, "call")]: calls, [plural(tokens, "token")]: tokens, ...rates };
    const pairs = Object.entries(facts).map(([name, value]) =>
      make("div", {}, make("dt", { text: name }), make("dd", { text: value })),
    );
    this.facts.replaceChildren(...pairs);
  }
}

function copyButton(text) {
  const button = make("button", { type: "button", class: "quiet", text: "Copy" });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copying is not allowed here";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return button;
}
