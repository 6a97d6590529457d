// Frames: the canvas after each step, { step, calls, cells }.

/**
 * The frame of an event of the stream, which holds all cells or those that have changed.
 * @param {object} data of the event
 * @param {object} [before] the frame before it
 */
export const frameOf = (data, before) => ({
  step: data.step,
  calls: data.model_calls,
  cells: data.cells ?? changed(before.cells, data.changes),
});

function changed(cells, changes) {
  const fresh = cells.slice();
  for (const { index, ...cell } of changes) fresh[index] = cell;
  return fresh;
}

/** The last frame that is not after `step`, or the first. */
export function frameAt(frames, step) {
  let chosen = frames[0];
  for (const frame of frames) {
    if (frame.step <= step) chosen = frame;
  }
  return chosen;
}

/** True for a control token such as <|im_end|>, which is no part of the text. */
export const isControl = (cell) => cell.state === "written" && /^<\|?[\w ]+\|?>$/.test(cell.text.trim());

/** Number of tokens written, control tokens left out. */
export const written = (frame) => frame.cells.filter((cell) => cell.state === "written" && !isControl(cell)).length;
