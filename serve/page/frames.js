// Frames: the canvas after each step, { step, calls, cells }.

/** The frame of an event of the stream. */
export const frameOf = (data) => ({ step: data.step, calls: data.model_calls, cells: data.cells });

/**
 * Frames made from the steps of a finished canvas, for a text whose steps were not streamed (the lengths of
 * its gaps were compared). Which masks were open is not known then: all count as open.
 */
export function framesOfSteps(cells) {
  const last = Math.max(-1, ...cells.map((cell) => cell.step ?? -1)) + 1;
  return Array.from({ length: last }, (_, i) => ({
    step: i + 1,
    calls: i + 1,
    cells: cells.map((cell) => (cell.state === "written" && cell.step > i ? masked(cell) : cell)),
  }));
}

const masked = (cell) => ({ ...cell, state: "open", text: "", probability: null, step: null });

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
