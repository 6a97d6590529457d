// Gaps in a text, written <mask:3>, <mask:2-6> or <mask>.

const GAP = /<mask(?::\d{1,7}(?:-\d{1,7})?)?>/g;

/** Number of gaps of a text. */
export const countGaps = (text) => (text.match(GAP) ?? []).length;

/** Put a gap of three tokens at the caret; its length is selected, to be typed over. */
export function insertGap(area) {
  const at = area.selectionStart;
  area.setRangeText("<mask:3>", at, area.selectionEnd);
  area.setSelectionRange(at + 6, at + 7);
  area.focus();
  area.dispatchEvent(new Event("input"));
}
