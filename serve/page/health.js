// Whether the server is there: asked gently, and at once after something failed.

import { readiness } from "./api.js";
import { byId } from "./dom.js";

const CALM = 15_000;
const AWAY = [1000, 1500, 2000, 3000, 5000];
const WORDS = { loading: "The server is loading its model.", draining: "The server is shutting down." };

/** Watches /ready; `back` is called when the server can be used, at first and after each absence. */
export class Health {
  /** @param {() => Promise<void>} back */
  constructor(back) {
    this.back = back;
    this.state = undefined;
    this.failures = 0;
    document.addEventListener("visibilitychange", () => document.hidden || this.check());
  }

  /** Ask now, and from then on at intervals. */
  async check() {
    clearTimeout(this.clock);
    this.asking ??= this.#ask().finally(() => (this.asking = null));
    await this.asking;
    clearTimeout(this.clock);
    if (!document.hidden) this.clock = setTimeout(() => this.check(), this.#pause());
  }

  #pause() {
    return this.state === true ? CALM : AWAY[Math.min(this.failures, AWAY.length - 1)];
  }

  async #ask() {
    const before = this.state;
    this.state = await readiness();
    this.failures = this.state === true ? 0 : this.failures + 1;
    this.#tell(before);
    if (this.state === true && before !== true) await this.back();
  }

  #tell(before) {
    const there = this.state === true;
    const away = WORDS[this.state] ?? "The server is gone. Waiting for it to come back.";
    const back = before === undefined || before === true ? "Ready" : "The server is back.";
    const element = byId("health");
    element.className = there ? "there" : "away";
    const words = there ? back : away;
    if (element.textContent !== words) element.textContent = words;
  }
}
