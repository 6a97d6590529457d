// Elements of the page. Text is only ever set as text, never as HTML.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element.
 * @param {string} tag
 * @param {object} properties its `text`, `class` and attributes; a function is a listener, false leaves it out
 * @param {...Node} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") element.textContent = value;
    else if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** A number as people read it: `120`, `34.5`, `1.84`. */
export const readable = (number) => number.toFixed(number >= 100 ? 0 : number >= 10 ? 1 : 2);

/** A probability in three digits. */
export const likely = (p) => (p < 0.0005 ? "below 0.001" : p.toFixed(3));

/** "gap" for 1, "gaps" for others. */
export const plural = (number, noun) => (number === 1 ? noun : `${noun}s`);
