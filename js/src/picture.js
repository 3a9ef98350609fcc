// A table as a picture, to be kept: what is seen of it on the page, drawn once more on a canvas.

import { h } from "./dom.js";

const SHARP = 2; // dots of the picture per pixel of the page
const MARGIN = 8;
const TITLE = 28; // room for a line above

/**
 * A cell where it stands, with its colours and its letters; what has no room is cut off.
 * @param {CanvasRenderingContext2D} context
 * @param {HTMLElement} cell
 * @param {DOMRect} table
 */
function draw(context, cell, table) {
  const box = cell.getBoundingClientRect();
  const [left, top] = [box.left - table.left, box.top - table.top];
  const look = getComputedStyle(cell);
  context.save();
  context.beginPath();
  context.rect(left, top, box.width, box.height);
  context.clip();
  context.fillStyle = look.backgroundColor;
  context.fillRect(left, top, box.width, box.height);
  context.fillStyle = look.color;
  context.font = `${look.fontWeight} ${look.fontSize} ${look.fontFamily}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(cell.textContent ?? "", left + box.width / 2, top + box.height / 2);
  context.restore();
}

/**
 * @param {HTMLElement} box in which the table can be scrolled
 * @param {HTMLTableElement} table
 * @param {string} title
 * @returns {Promise<Blob>} a PNG
 */
export function tablePicture(box, table, title) {
  const { scrollLeft, scrollTop } = box;
  box.scrollTo(0, 0); // or headings that stay in view would lie over cells
  const size = table.getBoundingClientRect();
  const look = getComputedStyle(table);
  const canvas = h("canvas");
  canvas.width = SHARP * (size.width + 2 * MARGIN);
  canvas.height = SHARP * (size.height + TITLE + MARGIN);
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(SHARP, SHARP);
  context.fillStyle = look.getPropertyValue("--sn-back");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = look.color;
  context.font = "600 14px system-ui, sans-serif";
  context.fillText(title, MARGIN, 0.7 * TITLE);
  context.translate(MARGIN, TITLE);
  for (const cell of table.querySelectorAll("th, td")) {
    draw(context, /** @type {HTMLElement} */ (cell), size);
  }
  box.scrollTo(scrollLeft, scrollTop);
  return new Promise((done, fail) => {
    canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("the picture is too large"))));
  });
}
