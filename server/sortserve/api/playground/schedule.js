// A depth schedule as people write it, `0:30, 32:27` (from token 0 on exit 30, from token 32 on
// exit 27), and as the API has it, `[[0, 30], [32, 27]]`.

import { exits } from "./exits.js";

const PAIR = /^(\d+)\s*:\s*(\d+)$/;

/** Pairs; what cannot be read stays a text, which the API refuses by name. */
export function readSchedule(text) {
  const parts = text.trim().split(/\s*[,;]\s*|\s+(?=\d+\s*:)/).filter(Boolean);
  const pairs = parts.map((part) => part.match(PAIR));
  return pairs.every(Boolean) ? pairs.map(([, from, exit]) => [Number(from), Number(exit)]) : text;
}

export function writeSchedule(schedule) {
  if (schedule === undefined) return "";
  if (!Array.isArray(schedule)) return schedule;
  return schedule.map(([from, exit]) => `${from}:${exit}`).join(", ");
}

/** In a few words. */
export function scheduleWords(schedule) {
  if (!Array.isArray(schedule)) return "a schedule";
  return `exit ${schedule.map(([, exit]) => exit).join(", then ")}`;
}

/** What an answer takes that follows it to the letter; null if a name is no exit, or unknown. */
export function scheduleTime(schedule, numTokens) {
  const estimates = schedule.map(
    ([, exit]) => exits.list.find((entry) => entry.exit_layer === exit)?.estimate,
  );
  if (!estimates.length || !estimates.every(Boolean)) return null;
  return schedule.reduce((time, [from], i) => {
    const begin = Math.min(numTokens, Math.max(1, from));
    const end = Math.min(numTokens, schedule[i + 1]?.[0] ?? numTokens);
    return time + Math.max(0, end - begin) * estimates[i].tpot_ms;
  }, estimates[0].ttft_ms);
}
