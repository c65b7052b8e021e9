// The strip of live figures, from `GET /status` once a second while the page is seen.

import { get } from "./api.js";
import { $, percent } from "./dom.js";
import { depthBar } from "./exits.js";

const EVERY_MS = 1000;
const WINDOW_S = 3; // tokens a second over so long
const recent = [];

export function startStrip() {
  setInterval(() => {
    if (!document.hidden) poll();
  }, EVERY_MS);
  return poll();
}

async function poll() {
  try {
    show(await get("status"));
    $("strip").classList.remove("stale");
  } catch {
    $("strip").classList.add("stale"); // whatever is wrong, the answers say it
    recent.length = 0;
  }
}

function show(status) {
  $("model").textContent = status.model;
  $("s-running").textContent = status.num_running;
  $("s-waiting").textContent = status.num_waiting ? `${status.num_waiting} waiting` : "";
  const words = status.num_running ? "Running rows" : "Nothing runs";
  depthBar($("s-rows"), status.running_by_exit, words);
  $("s-rate").textContent = rate(status);
  $("s-pressure").textContent = percent(status.pressure);
  $("s-overload").textContent = status.overload_level ? `overload ${status.overload_level}` : "";
  const { met, missed, rejected } = status.budgets;
  const all = met + missed + rejected;
  $("s-met").textContent = all ? percent(met / all) : "–";
  $("s-met-of").textContent = all ? `${met} of ${all}` : "";
  const { layers_run: run, layers_full: full } = status;
  $("s-saved").textContent = full ? percent(1 - run / full) : "–";
}

function rate(status) {
  const tokens = Object.values(status.tokens_by_exit).reduce((sum, n) => sum + n, 0);
  recent.push([status.time_s, tokens]);
  while (recent.length > 2 && status.time_s - recent[0][0] > WINDOW_S) recent.shift();
  const [from, before] = recent[0];
  const seconds = status.time_s - from;
  return seconds > 0 ? Math.round((tokens - before) / seconds) : "–";
}
