// The exits: what `GET /exits` says of them, their colours, and what they would take.

import { $, el, ms, percent } from "./dom.js";

const RAMP = 5; // colours of the ramp in style.css, from shallow to deep

export const exits = { list: [], schedules: [], full: 0, minQuality: 0 };

export function useExits(reply) {
  exits.list = reply.exits;
  exits.schedules = reply.schedules;
  exits.full = reply.exits.at(-1).exit_layer;
  exits.minQuality = reply.min_quality;
  exits.hasTimes = reply.exits.every((exit) => exit.estimate);
}

/** The colour of an exit as CSS: its place between the shallowest and the deepest, on the ramp. */
export function colour(exitLayer) {
  const n = exits.list.length;
  const index = exits.list.findIndex((exit) => exit.exit_layer === Number(exitLayer));
  const place = n > 1 && index >= 0 ? (index / (n - 1)) * (RAMP - 1) : RAMP - 1;
  const low = Math.floor(place);
  const high = Math.min(RAMP - 1, low + 1);
  const share = Math.round(100 * (1 - (place - low)));
  return `color-mix(in oklab, var(--ramp-${low}) ${share}%, var(--ramp-${high}))`;
}

export function paint(element, exitLayer) {
  element.style.setProperty("--exit", colour(exitLayer));
  return element;
}

/** The time of an answer of so many tokens at an exit, if it were asked for now; null if unknown. */
export function timeAt(exit, numTokens) {
  if (!exit.estimate) return null;
  return exit.estimate.ttft_ms + (numTokens - 1) * exit.estimate.tpot_ms;
}

/** The exits that a budget leaves, ascending: what the server would choose from. */
export function allowed(budget) {
  if (budget.exit_layer) return exits.list.filter((e) => e.exit_layer === budget.exit_layer);
  if (Array.isArray(budget.schedule) && budget.schedule.length) {
    const [first, last] = [budget.schedule[0][1], budget.schedule.at(-1)[1]];
    return exits.list.filter((e) => e.exit_layer >= last && e.exit_layer <= first);
  }
  const named = budget.min_exit_layer !== undefined || budget.min_quality !== undefined;
  return exits.list.filter(
    (e) =>
      (named || e.served_unasked) &&
      e.exit_layer >= (budget.min_exit_layer ?? 0) &&
      (e.exit_layer === exits.full || (e.score ?? 0) >= (budget.min_quality ?? 0)) &&
      e.compute <= (budget.compute ?? 1) + 1e-9,
  );
}

/** The deepest of them whose times fit; null if none does. */
export function likelyExit(budget, numTokens) {
  const fits = allowed(budget).filter((exit) => {
    if (!exit.estimate) return true;
    const { ttft_ms: ttft, tpot_ms: tpot } = exit.estimate;
    return (
      timeAt(exit, numTokens) <= (budget.latency_ms ?? Infinity) &&
      ttft <= (budget.ttft_ms ?? Infinity) &&
      tpot <= (budget.tpot_ms ?? Infinity)
    );
  });
  return fits.at(-1) ?? null;
}

export function swatch(exitLayer) {
  return paint(el("span", { class: "swatch", "aria-hidden": "true" }), exitLayer);
}

export const nameOf = (exitLayer) =>
  Number(exitLayer) === exits.full ? `${exitLayer} (full depth)` : String(exitLayer);

export function showLegend() {
  const entries = exits.list.map((exit) =>
    el("span", { class: "key-entry" }, swatch(exit.exit_layer), String(exit.exit_layer)),
  );
  $("legend").replaceChildren(el("span", { class: "legend-title" }, "Exit layer"), ...entries);
}

export function showTable(numTokens) {
  const rows = exits.list.map((exit) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, swatch(exit.exit_layer), String(exit.exit_layer)),
      el("td", {}, percent(exit.compute)),
      el("td", {}, exit.score === null ? "–" : exit.score.toFixed(2)),
      el("td", {}, ms(timeAt(exit, numTokens))),
    ),
  );
  $("exits").replaceChildren(...rows);
  const unasked = exits.list.filter((exit) => !exit.served_unasked).map((e) => e.exit_layer);
  const notes = exits.hasTimes
    ? [`Now: an answer of ${numTokens} tokens, if it were asked for at this moment.`]
    : ["This server does not predict times (--no-calibrate)."];
  if (unasked.length) {
    notes.push(`Exits ${unasked.join(", ")} are below the server's floor: only who names them gets them.`);
  }
  $("exits-note").textContent = notes.join(" ");
}

/** A bar cut into parts by exit, the deepest first; `counts` maps exits to numbers. */
export function depthBar(element, counts, words) {
  const parts = Object.entries(counts)
    .filter(([, n]) => n > 0)
    .sort(([a], [b]) => b - a);
  element.replaceChildren(
    ...parts.map(([exit, n]) => {
      const part = paint(el("span", {}), exit);
      part.style.flexGrow = n;
      return part;
    }),
  );
  const said = parts.map(([exit, n]) => `${n} at exit ${exit}`).join(", ");
  element.setAttribute("aria-label", said ? `${words}: ${said}` : words);
}
