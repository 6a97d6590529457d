// Settings: the decoders, their options, and what a request says of them.

import { byId, make } from "./dom.js";

/** A decoder with its options and pace. */
class Side {
  /** @param {object} catalogue of /v1/decoders */
  constructor(catalogue) {
    this.catalogue = catalogue;
    this.element = byId("side").content.firstElementChild.cloneNode(true);
    this.decoder = this.element.querySelector(".decoder");
    this.pace = this.element.querySelector(".pace");
    this.value = this.element.querySelector(".pace-value");
    this.decoder.append(...catalogue.data.map(({ name }) => make("option", { text: name })));
    this.decoder.addEventListener("change", () => this.choose(this.decoder.value));
    this.pace.addEventListener("change", () => this.#adaptPace());
  }

  /** Take a decoder, with the defaults of its options. */
  choose(name) {
    this.decoder.value = name;
    this.preset = this.catalogue.data.find((preset) => preset.name === name);
    const { summary, paper, exact, timed } = this.preset;
    this.element.querySelector(".summary").textContent = `${summary} (${paper})${exact ? "; exact" : ""}`;
    const inputs = Object.entries(this.#defaults()).map(([option, value]) => optionInput(option, value));
    this.element.querySelector(".options").replaceChildren(...inputs.filter(Boolean));
    this.pace.value = timed ? "steps" : "";
    for (const option of this.pace.options) option.disabled = timed && option.value !== "steps";
    this.#adaptPace();
  }

  /** Parameters of a request. */
  parameters() {
    const body = {};
    if (this.preset.name !== this.catalogue.default) body.decoder = this.preset.name;
    const inputs = [...this.element.querySelectorAll(".options input")].filter(isGiven);
    const options = inputs.map((input) => [input.name, valueOf(input)]);
    if (options.length) body.options = Object.fromEntries(options);
    if (this.pace.value && this.value.value) body[this.pace.value] = Number(this.value.value);
    return body;
  }

  #defaults() {
    const usual = this.preset.name === this.catalogue.default;
    return { ...this.preset.options, ...(usual ? this.catalogue.default_options : {}) };
  }

  #adaptPace() {
    this.value.disabled = !this.pace.value;
    this.value.parentElement.hidden = !this.pace.value;
    this.value.required = Boolean(this.pace.value);
    this.value.step = this.pace.value === "steps" ? "1" : "any";
    this.value.value = { "": "", rate: 2, steps: 32 }[this.pace.value];
  }
}

/** An input for an option, whose default is its placeholder; none for lists. */
function optionInput(name, value) {
  if (Array.isArray(value)) return null;
  if (typeof value === "boolean") {
    const box = make("input", { type: "checkbox", name });
    box.checked = box.defaultChecked = value;
    return make("label", { text: `${name.replaceAll("_", " ")} ` }, box);
  }
  const isText = typeof value === "string" || name === "table";
  const kind = isText ? { type: "text" } : { type: "number", step: "any", inputmode: "decimal" };
  const input = make("input", { ...kind, name, placeholder: value ?? "automatic" });
  return make("label", { text: `${name.replaceAll("_", " ")} ` }, input);
}

const isGiven = (input) =>
  input.type === "checkbox" ? input.checked !== input.defaultChecked : Boolean(input.value.trim());

const valueOf = (input) => {
  if (input.type === "checkbox") return input.checked;
  return input.type === "number" ? Number(input.value) : input.value.trim();
};

/** All settings of the page. */
export class Settings {
  constructor() {
    this.sides = [];
    byId("compare").addEventListener("change", () => this.#showSides());
  }

  /** Take the decoders that the server has; choices stay when it comes back. */
  load(catalogue) {
    const names = this.sides.map((side) => side.decoder.value);
    if (names.length && JSON.stringify(catalogue) === JSON.stringify(this.sides[0].catalogue)) return;
    this.sides = [new Side(catalogue), new Side(catalogue)];
    const second = catalogue.default === "conv" ? "categorical" : "conv";
    this.sides[0].choose(catalogue.default);
    this.sides[1].choose(second);
    byId("sides").replaceChildren(...this.sides.map((side) => side.element));
    this.#showSides();
  }

  /** True when two decoders answer. */
  get compares() {
    return byId("compare").checked;
  }

  /** True when they do so one after the other. */
  get inTurn() {
    return byId("in-turn").checked;
  }

  /** The sides that answer. */
  get active() {
    return this.sides.slice(0, this.compares ? 2 : 1);
  }

  /** The seed given, or a new one. */
  seed() {
    const given = byId("seed").value;
    return given === "" ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 : Number(given);
  }

  /** The longest answer, in tokens. */
  get maxTokens() {
    return Number(byId("max-tokens").value) || undefined;
  }

  /** False when an input holds what cannot be; the browser shows which. */
  valid() {
    const inputs = [...byId("settings").querySelectorAll("input")].filter((input) => !input.closest("[hidden]"));
    return inputs.every((input) => input.checkValidity() || (input.reportValidity(), false));
  }

  #showSides() {
    const [first, second] = this.sides;
    byId("in-turn-row").hidden = !this.compares;
    if (!second) return;
    second.element.hidden = !this.compares;
    first.element.querySelector("legend").textContent = this.compares ? "Left" : "Decoder";
    second.element.querySelector("legend").textContent = "Right";
  }
}
