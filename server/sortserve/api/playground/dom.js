// Small helpers. Text only ever becomes text nodes: nothing a model says is read as HTML.

export const $ = (id) => document.getElementById(id);

/** An element: `el("p", {class: "hint", onclick: f}, "text", child)`. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

const number = (digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits });
const whole = number(0);
const tenths = number(1);

export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 10000) return `${tenths.format(value / 1000)} s`;
  return `${(value < 100 ? tenths : whole).format(value)} ms`;
}

export const percent = (share) => `${whole.format(100 * share)} %`;
export const count = (n, word) => `${whole.format(n)} ${word}${n === 1 ? "" : "s"}`;

/** Say something to a screen reader, once. */
export function announce(text) {
  $("announcer").textContent = text;
}
