// The budget form: fields to the API's `budget` object and back, the slider, and what it would buy.

import { $, el, ms, percent } from "./dom.js";
import { allowed, colour, exits, likelyExit, nameOf, timeAt } from "./exits.js";
import { readSchedule, scheduleTime, scheduleWords, writeSchedule } from "./schedule.js";

const NUMBERS = ["latency_ms", "ttft_ms", "tpot_ms", "min_quality"];
const SAMPLING = [
  ...["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"],
  ...["presence_penalty", "frequency_penalty", "seed"],
];
const NO_LIMIT = 200; // the slider's last place
const TYPICAL_TOKENS = 128;

/** The budget that the form says; only what was given. What makes no sense is the API's to refuse. */
export function readBudget() {
  const budget = {};
  for (const name of NUMBERS) if ($(name).value !== "") budget[name] = Number($(name).value);
  if ($("compute").value !== "") budget.compute = Number($("compute").value) / 100;
  for (const name of ["exit_layer", "min_exit_layer"]) {
    if ($(name).value) budget[name] = Number($(name).value);
  }
  if ($("schedule").value.trim()) budget.schedule = readSchedule($("schedule").value);
  if ($("on_miss").value) budget.on_miss = $("on_miss").value;
  return budget;
}

export function writeBudget(budget) {
  for (const name of NUMBERS) $(name).value = budget[name] ?? "";
  $("compute").value = budget.compute === undefined ? "" : Number((100 * budget.compute).toFixed(4));
  for (const name of ["exit_layer", "min_exit_layer", "on_miss"]) $(name).value = budget[name] ?? "";
  $("schedule").value = writeSchedule(budget.schedule);
  showSlider(budget);
}

export function readSampling() {
  const sampling = {};
  for (const name of SAMPLING) if ($(name).value !== "") sampling[name] = Number($(name).value);
  if ($("stop").value) sampling.stop = [$("stop").value];
  return sampling;
}

export const maxTokens = () => Number($("max_tokens").value) || TYPICAL_TOKENS;

/** A budget in a few words. */
export function summary(budget) {
  const parts = [];
  if (budget.exit_layer) parts.push(`exit ${budget.exit_layer}`);
  if (budget.schedule !== undefined) parts.push(scheduleWords(budget.schedule));
  if (budget.latency_ms !== undefined) parts.push(ms(budget.latency_ms));
  if (budget.ttft_ms !== undefined) parts.push(`first token ${ms(budget.ttft_ms)}`);
  if (budget.tpot_ms !== undefined) parts.push(`${ms(budget.tpot_ms)} a token`);
  if (budget.compute !== undefined) parts.push(`${percent(budget.compute)} compute`);
  if (budget.min_exit_layer) parts.push(`exit ${budget.min_exit_layer} or deeper`);
  if (budget.min_quality !== undefined) parts.push(`quality from ${budget.min_quality}`);
  if (budget.on_miss && parts.length) parts.push(`else ${budget.on_miss}`);
  return parts.join(", ") || "no limit";
}

// ---- the slider: times on a logarithmic scale, around what the exits take ----

function range() {
  const times = exits.list.map((exit) => timeAt(exit, maxTokens())).filter((t) => t !== null);
  if (!times.length) return [50, 60000];
  return [Math.min(...times) * 0.6, Math.max(...times) * 2];
}

function timeOf(place) {
  const [low, high] = range();
  const time = low * (high / low) ** (place / (NO_LIMIT - 1));
  const unit = 10 ** Math.max(0, Math.floor(Math.log10(time)) - 1); // two digits are enough
  return Math.round(time / unit) * unit;
}

function placeOf(time) {
  const [low, high] = range();
  const place = (Math.log(time / low) / Math.log(high / low)) * (NO_LIMIT - 1);
  return Math.round(Math.min(NO_LIMIT - 1, Math.max(0, place)));
}

export function slid() {
  const place = Number($("latency-slider").value);
  $("latency_ms").value = place === NO_LIMIT ? "" : timeOf(place);
}

/** Slider, track and forecast after a change of the budget, of the length, or of the times. */
export function showSlider(budget) {
  const slider = $("latency-slider");
  const time = budget.latency_ms;
  slider.value = time > 0 ? placeOf(time) : NO_LIMIT;
  slider.setAttribute("aria-valuetext", time > 0 ? ms(time) : "no limit");
  showTrack(budget);
  $("forecast").textContent = forecast(budget);
}

/** The track in the colour of the exit that each time would buy. */
function showTrack(budget) {
  const rest = { ...budget, latency_ms: undefined };
  const buys = allowed(rest).filter((exit) => exit.estimate);
  const stops = buys.map((exit) => [placeOf(timeAt(exit, maxTokens())) / NO_LIMIT, exit]);
  const parts = [`var(--line) 0 ${stops.length ? 100 * stops[0][0] : 100}%`];
  stops.forEach(([from, exit], i) => {
    const to = i + 1 < stops.length ? stops[i + 1][0] : 1;
    parts.push(`${colour(exit.exit_layer)} ${100 * from}% ${100 * to}%`);
  });
  $("track").style.background = `linear-gradient(to right, ${parts.join(", ")})`;
}

function forecast(budget) {
  if (!exits.list.length) return "";
  if (!exits.hasTimes) return "Times are not predicted on this server.";
  const named = Array.isArray(budget.schedule) ? scheduleTime(budget.schedule, maxTokens()) : null;
  if (named !== null && named <= (budget.latency_ms ?? Infinity)) {
    return `By the schedule: about ${ms(named)} for ${maxTokens()} tokens.`;
  }
  const exit = likelyExit(budget, maxTokens());
  if (exit) {
    const time = ms(timeAt(exit, maxTokens()));
    return `Likely exit ${nameOf(exit.exit_layer)}: about ${time} for ${maxTokens()} tokens.`;
  }
  const then = {
    truncate: "the answer stops at the deadline",
    reject: "the request is refused",
  }[budget.on_miss];
  return `No exit fits now: ${then ?? "the answer comes late"}.`;
}

/** Fill the selects with the exits. */
export function offerExits() {
  for (const id of ["exit_layer", "min_exit_layer"]) {
    const select = $(id);
    const chosen = select.value;
    select.replaceChildren(
      select.options[0],
      ...exits.list.map((e) => el("option", { value: e.exit_layer }, nameOf(e.exit_layer))),
    );
    select.value = chosen;
  }
  $("schedules").replaceChildren(
    ...exits.schedules.map((entry) => el("option", { value: writeSchedule(entry.schedule) })),
  );
  const [deep, shallow] = [exits.full, exits.list.find((e) => e.served_unasked) ?? exits.list[0]];
  $("schedule").placeholder = `0:${deep}, 64:${shallow.exit_layer}`;
  $("min_quality").placeholder = String(exits.minQuality);
}
