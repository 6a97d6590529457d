// One turn: what was asked, a panel for each decoder, and the timeline they share.

import { make } from "./dom.js";
import { Panel } from "./panel.js";

let turns = 0;

/** A prompt and its answers. */
export class Turn {
  /**
   * @param {string} prompt as it was typed
   * @param {number} seed of all answers
   * @param {string[]} decoders one for each answer
   * @param {boolean} fills true for a text with gaps, which is no part of the conversation
   */
  constructor(prompt, seed, decoders, fills) {
    this.prompt = prompt;
    this.fills = fills;
    this.panels = decoders.map((name) => new Panel(name, () => this.#follow()));
    this.timeline = new Timeline((step) => this.panels.forEach((panel) => panel.show(step)));
    this.note = make("p", { class: "soft" });
    this.chosen = 0;
    this.element = make(
      "article",
      { class: "turn" },
      make("p", { class: "asked", text: prompt }),
      make("div", { class: `panels panels-${decoders.length}` }, ...this.panels.map((panel) => panel.element)),
      this.timeline.element,
      legend(seed),
      this.note,
    );
  }

  /**
   * Run all panels.
   * @param {object[]} bodies a request for each
   * @param {AbortSignal} signal
   * @param {boolean} inTurn one after the other
   */
  async run(bodies, signal, inTurn) {
    if (bodies.length > 1 && !inTurn) {
      this.note.textContent = "Both were written at once and shared the machine. For fair times, write one after the other.";
    }
    if (inTurn) {
      for (const [i, body] of bodies.entries()) await this.panels[i].run(body, signal);
    } else {
      const runs = await Promise.allSettled(bodies.map((body, i) => this.panels[i].run(body, signal)));
      const failed = runs.find((run) => run.status === "rejected");
      if (failed) throw failed.reason;
    }
    if (this.panels.length > 1 && !this.fills) this.#offerChoice();
  }

  /** The two messages that this turn adds to the conversation; none when it was stopped. */
  get messages() {
    const answer = this.panels[this.chosen].answer;
    if (this.fills || answer === null) return [];
    return [
      { role: "user", content: this.prompt },
      { role: "assistant", content: answer },
    ];
  }

  #follow() {
    this.timeline.extend(Math.max(...this.panels.map((panel) => panel.steps)));
  }

  #offerChoice() {
    const group = `turn-${(turns += 1)}`;
    this.panels.forEach((panel, i) => {
      const radio = make("input", { type: "radio", name: group, change: () => (this.chosen = i) });
      radio.checked = i === this.chosen;
      panel.actions.append(make("label", { class: "check" }, radio, "Carry on with this"));
    });
  }
}

/** A range over the steps, with replay; it follows the last step until somebody moves it. */
class Timeline {
  /** @param {(step: number) => void} show */
  constructor(show) {
    this.show = show;
    this.follows = true;
    this.range = make("input", { type: "range", min: "1", max: "1", value: "1", "aria-label": "Step" });
    this.range.addEventListener("input", () => this.#scrub());
    this.button = make("button", { type: "button", class: "quiet", text: "Replay", click: () => this.#toggle() });
    this.output = make("output", { class: "soft" });
    this.element = make("div", { class: "timeline", hidden: true }, this.button, this.range, this.output);
  }

  get #last() {
    return Number(this.range.max);
  }

  /** There are now this many steps. */
  extend(steps) {
    this.element.hidden = false;
    this.range.max = Math.max(1, steps);
    if (this.follows) this.range.value = this.range.max;
    this.#soon();
  }

  /** Draw before the next picture, however many steps arrive until then. */
  #soon() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.#draw();
    });
  }

  #draw() {
    const step = Number(this.range.value);
    this.output.textContent = `step ${step} of ${this.#last}`;
    this.range.setAttribute("aria-valuetext", this.output.textContent);
    this.show(step);
  }

  #scrub() {
    this.#pause();
    this.follows = this.range.value === this.range.max;
    this.#soon();
  }

  #toggle() {
    if (this.clock) return this.#pause();
    if (Number(this.range.value) >= this.#last) this.range.value = 1;
    this.button.textContent = "Pause";
    this.#draw();
    this.clock = setInterval(() => this.#tick(), Math.min(250, Math.max(60, 4000 / this.#last)));
  }

  #tick() {
    this.range.value = Number(this.range.value) + 1;
    this.#draw();
    if (Number(this.range.value) >= this.#last) this.#pause();
  }

  #pause() {
    clearInterval(this.clock);
    this.clock = null;
    this.button.textContent = "Replay";
  }
}

function legend(seed) {
  const swatches = [0, 1, 2, 3, 4].map((t) => {
    const swatch = make("span", { class: "cell written swatch" });
    swatch.style.setProperty("--t", t);
    return swatch;
  });
  const entry = (kind, words) => make("li", {}, make("span", { class: `cell ${kind}` }), words);
  return make(
    "ul",
    { class: "legend soft", "aria-label": "Legend" },
    make("li", {}, "first step ", ...swatches, " last step"),
    entry("open", "open mask"),
    entry("shut", "shut mask"),
    entry("control", "control token"),
    make("li", { text: `seed ${seed}` }),
  );
}
