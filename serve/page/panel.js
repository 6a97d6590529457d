// One answer by one decoder: its canvas, its frames, and its numbers.

import { ServerError, canvasEvents } from "./api.js";
import { CanvasView } from "./canvas.js";
import { make, plural, readable } from "./dom.js";
import { frameAt, frameOf, framesOfSteps, written } from "./frames.js";

/** What one decoder makes of a prompt. */
export class Panel {
  /**
   * @param {string} name of the decoder
   * @param {() => void} changed called when there is a new frame
   */
  constructor(name, changed) {
    this.name = name;
    this.changed = changed;
    this.frames = [];
    this.answer = null;
    this.view = new CanvasView(`Canvas of ${name}`);
    this.facts = make("dl", { class: "facts" });
    this.problem = make("p", { class: "problem", role: "alert" });
    this.note = make("p", { class: "soft" });
    this.actions = make("div", { class: "row" });
    this.element = make(
      "section",
      { class: "panel", "aria-label": `Answer by ${name}` },
      make("div", { class: "row head" }, make("h3", { text: name }), this.actions),
      this.view.element,
      this.facts,
      this.note,
      this.problem,
    );
  }

  /** Steps so far. */
  get steps() {
    return this.frames.at(-1)?.step ?? 0;
  }

  /** Decode, and follow every step; raises when it is stopped or fails. */
  async run(body, signal) {
    const begun = performance.now();
    this.element.setAttribute("aria-busy", "true");
    try {
      for await (const { name, data } of canvasEvents(body, signal)) {
        if (name === "done") this.#finish(data, (performance.now() - begun) / 1000);
        else this.#add(frameOf(data));
      }
      if (!this.answer) throw new ServerError("The answer broke off.");
    } catch (error) {
      this.#fail(error);
      throw error;
    } finally {
      this.element.removeAttribute("aria-busy");
    }
  }

  /** Show the canvas as it was after a step. */
  show(step) {
    if (this.frames.length) this.view.draw(frameAt(this.frames, step), this.steps);
  }

  #add(frame) {
    this.frames.push(frame);
    this.#list(frame.calls, written(frame));
    this.changed();
  }

  #finish(data, seconds) {
    this.answer = data.text;
    if (!this.frames.length && data.gaps) {
      this.frames = framesOfSteps(data.cells);
      this.note.textContent = "Several lengths were tried. This is the likeliest, replayed from its steps.";
    }
    this.frames = this.frames.filter((frame) => frame.step < data.step);
    this.frames.push(frameOf(data));
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
