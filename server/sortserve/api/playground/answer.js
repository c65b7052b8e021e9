// One answer: its tokens as they come, and what became of its budget.

import { ApiError, stream } from "./api.js";
import { count, el, ms, percent } from "./dom.js";
import { depthBar, nameOf, paint } from "./exits.js";

const ENDS = {
  length: "cut at the most tokens",
  deadline: "stopped at the deadline",
  abort: "ended by the server",
};

export class Answer {
  /** @param budget what was asked for, to set beside what happened. */
  constructor(budget) {
    this.budget = budget;
    this.text = "";
    this.numTokens = 0;
    this.report = null;
    this.body = el("div", { class: "tokens" });
    this.state = el("p", { class: "state" }, "Waiting for the first token");
    this.outcome = el("div", { class: "outcome" });
    this.element = el("article", { class: "answer", "aria-busy": "true" }, this.body, this.state, this.outcome);
  }

  /** Ask, and show what comes; resolves when it is over, however it ends. */
  async run(body, controller) {
    try {
      await stream(body, {
        signal: controller.signal,
        onStart: (headers) => this.#started(headers),
        onEvent: (event) => this.#event(event),
      });
    } catch (error) {
      if (error.name === "AbortError") this.#stopped();
      else this.fail(error);
    }
    this.element.setAttribute("aria-busy", "false");
  }

  #started(headers) {
    const predicted = headers.get("x-predicted-ms");
    const exit = headers.get("x-exit-layer");
    const time = predicted === null ? "" : `, predicted ${ms(Number(predicted))}`;
    this.state.textContent = `Starts at exit ${exit}${time}`;
  }

  #event(event) {
    for (const choice of event.choices) {
      this.numTokens += 1;
      this.#add(choice.text, choice.exit_layer);
      if (choice.finish_reason) this.finishReason = choice.finish_reason;
    }
    if (event.budget) this.#finished(event.budget);
  }

  #add(text, exitLayer) {
    if (!text) return; // half a character, or an end-of-sequence token
    this.text += text;
    if (exitLayer !== this.exitLayer) {
      if (this.exitLayer !== undefined) {
        this.body.append(paint(el("span", { class: "change" }, `exit ${exitLayer}`), exitLayer));
      }
      const title = `Made at exit ${nameOf(exitLayer)}`;
      this.piece = paint(el("span", { class: "run", title, "data-exit": exitLayer }), exitLayer);
      this.body.append(this.piece);
      this.exitLayer = exitLayer;
    }
    this.piece.append(text);
    this.state.textContent = `Exit ${exitLayer}, ${count(this.numTokens, "token")}`;
  }

  #finished(report) {
    this.report = report;
    this.state.remove();
    const bar = el("span", { class: "depthbar", role: "img" });
    depthBar(bar, report.tokens_by_exit, "Tokens by exit");
    const end = ENDS[this.finishReason];
    const note = [
      count(this.numTokens, "token"),
      Object.keys(report.tokens_by_exit).length > 1
        ? `ended at exit ${report.exit_layer}`
        : `exit ${report.exit_layer}`,
      ...(report.degraded ? ["degraded"] : []),
      ...(end ? [end] : []),
    ].join(" · ");
    this.outcome.replaceChildren(
      el("p", { class: "verdict" }, verdict(report.met), el("span", {}, note)),
      bar,
      el(
        "dl",
        { class: "metrics" },
        metric("First token", report.ttft_ms, report.predicted_ttft_ms, this.budget.ttft_ms),
        metric("Each token", report.tpot_ms, report.predicted_tpot_ms, this.budget.tpot_ms),
        metric("Total", report.actual_ms, report.predicted_ms, this.budget.latency_ms),
        cell("Compute saved", percent(1 - report.compute), ["of full depth"], false),
      ),
    );
  }

  #stopped() {
    this.state.textContent = `Stopped after ${count(this.numTokens, "token")}`;
    this.state.classList.add("ended");
  }

  /** Show an error as the API said it. */
  fail(error) {
    if (!(error instanceof ApiError)) throw error;
    this.error = error;
    this.state.remove();
    this.outcome.replaceChildren(errorBox(error));
  }

  /** What a screen reader hears when it is over. */
  get spoken() {
    if (this.error) return `Error: ${this.error.message}`;
    if (!this.report) return "Answer stopped.";
    const { met, exit_layer: exit, actual_ms: time } = this.report;
    const budget = met === null ? "" : met ? " Budget met." : " Budget missed.";
    return `Answer complete: ${count(this.numTokens, "token")}, exit ${exit}, ${ms(time)}.${budget}`;
  }
}

export function errorBox(error) {
  const facts = [
    ...(error.status ? [`HTTP ${error.status}`] : []),
    ...(error.param ? [error.param] : []),
    ...(error.code ? [error.code] : []),
    ...(error.retryAfter ? [`come back in ${error.retryAfter} s`] : []),
  ];
  return el(
    "div",
    { class: "error", role: "alert" },
    el("p", {}, error.message),
    el("p", { class: "facts" }, facts.join(" · ")),
  );
}

function verdict(met) {
  if (met === null) return el("span", { class: "badge" }, "No time limit");
  return met
    ? el("span", { class: "badge met" }, "✓ Budget met")
    : el("span", { class: "badge missed" }, "✕ Budget missed");
}

function metric(label, actual, predicted, limit) {
  const notes = [];
  if (predicted !== null) notes.push(`predicted ${ms(predicted)}`);
  if (limit !== undefined) notes.push(`limit ${ms(limit)}`);
  return cell(label, ms(actual), notes, limit !== undefined && actual > limit);
}

function cell(label, value, notes, isLate) {
  return el(
    "div",
    { class: isLate ? "late" : null },
    el("dt", {}, label),
    el("dd", {}, value),
    ...notes.map((note) => el("dd", { class: "note" }, note)),
  );
}
