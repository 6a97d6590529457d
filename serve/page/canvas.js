// A canvas as a row of cells, and the tip that tells of one of them.

import { byId, likely, make } from "./dom.js";
import { isControl } from "./frames.js";

/** Cells that are drawn again only where they change; arrow keys go from one to the next. */
export class CanvasView {
  /** @param {string} label for those who hear the page */
  constructor(label) {
    this.cells = [];
    this.element = make("div", {
      class: "canvas",
      role: "group",
      tabindex: "0",
      "aria-label": `${label}. Arrow keys go from token to token.`,
      keydown: (event) => this.#move(event),
      pointerover: (event) => tip.showFor(event.target.closest(".cell")),
      pointerleave: () => tip.hide(),
      focusin: (event) => tip.showFor(event.target.closest(".cell")),
      focusout: () => tip.hide(),
    });
  }

  /**
   * Show a frame.
   * @param {object} frame
   * @param {number} steps of the whole canvas, for the colours
   */
  draw(frame, steps) {
    this.element.style.setProperty("--n", Math.max(1, steps - 1));
    frame.cells.forEach((cell, i) => this.#drawCell(cell, i));
    for (const { span } of this.cells.splice(frame.cells.length)) span.remove();
    tip.refresh();
  }

  #drawCell(cell, i) {
    const kind = isControl(cell) ? "control" : cell.state;
    const key = `${kind} ${cell.token_id} ${cell.step} ${cell.text}`;
    if (this.cells[i]?.key === key) return;
    if (!this.cells[i]) {
      const span = make("span", { tabindex: "-1" });
      this.cells[i] = { span };
      this.element.append(span);
    }
    this.cells[i].key = key;
    paint(this.cells[i].span, cell, kind);
  }

  #move(event) {
    const spans = this.cells.map(({ span }) => span);
    const at = spans.indexOf(document.activeElement);
    const target = {
      ArrowRight: spans[Math.min(at + 1, spans.length - 1)],
      ArrowLeft: spans[Math.max(at - 1, 0)],
      Home: spans[0],
      End: spans.at(-1),
      Escape: at < 0 ? undefined : this.element,
    }[event.key];
    if (!target) return;
    event.preventDefault();
    event.stopPropagation();
    target.focus();
  }
}

const NAMES = { open: "open mask", shut: "shut mask", control: "control token" };

/** Make a span look like a cell. */
function paint(span, cell, kind) {
  span.className = `cell ${kind}`;
  if (/^\s*\n\s*$/.test(cell.text)) span.classList.add("newline");
  span.cell = cell;
  span.textContent = kind === "control" ? "" : cell.text;
  if (kind in NAMES) {
    span.setAttribute("role", "img");
    span.setAttribute("aria-label", NAMES[kind]);
  } else {
    span.removeAttribute("role");
    span.removeAttribute("aria-label");
  }
  span.style.setProperty("--t", cell.step ?? 0);
}

/** The words of the tip. */
function describe(cell) {
  if (cell.state === "open") return ["Open mask", "may be written in the next step"];
  if (cell.state === "shut") return ["Shut mask", "outside the window in this step"];
  const text = isControl(cell) ? `Control token ${cell.text}` : `“${cell.text.replaceAll("\n", "↵")}”`;
  if (cell.state === "given") return [text, "given"];
  const chance = cell.probability === null ? "filled in" : `probability ${likely(cell.probability)}`;
  return [text, `${chance}, step ${cell.step + 1}`];
}

/** One tip for the page, beside the cell under the pointer or in focus. */
const tip = {
  span: null,

  showFor(span) {
    if (!span) return;
    this.hide();
    this.span = span;
    span.setAttribute("aria-describedby", "tip");
    this.refresh();
  },

  hide() {
    this.span?.removeAttribute("aria-describedby");
    this.span = null;
    byId("tip").hidden = true;
  },

  refresh() {
    if (!this.span) return;
    if (!this.span.isConnected) return this.hide();
    const [title, words] = describe(this.span.cell);
    const element = byId("tip");
    element.replaceChildren(make("strong", { text: title }), make("span", { text: words }));
    element.hidden = false;
    place(element, this.span);
  },
};

/** Put the tip above a span, or below where there is no room, within the window. */
function place(element, span) {
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - element.offsetWidth - 8);
  const above = box.top - element.offsetHeight - 6;
  element.style.left = `${Math.max(8, left)}px`;
  element.style.top = `${above > 4 ? above : box.bottom + 6}px`;
}

document.addEventListener("scroll", () => tip.hide(), { passive: true });
document.addEventListener("keydown", (event) => event.key === "Escape" && tip.hide());
