// One prompt at up to four budgets, started together: the server runs them in one batch.

import { Answer } from "./answer.js";
import { summary } from "./budget.js";
import { $, el } from "./dom.js";

const MAX_LANES = 4;
const NAMES = "ABCD";

export class Compare {
  /** @param onSelect called when another lane's budget is to be edited. */
  constructor(onSelect) {
    this.onSelect = onSelect;
    this.lanes = [];
    this.selected = 0;
    this.hasRun = false;
  }

  get lane() {
    return this.lanes[this.selected];
  }

  add(budget) {
    if (this.lanes.length < MAX_LANES) this.lanes.push({ budget, answer: null });
    this.select(this.lanes.length - 1);
  }

  /** Begin with these budgets. */
  suggest(budgets) {
    this.lanes = budgets.map((budget) => ({ budget, answer: null }));
  }

  remove(index) {
    this.lanes.splice(index, 1);
    this.select(Math.min(this.selected, this.lanes.length - 1));
  }

  select(index) {
    this.selected = index;
    this.show();
    this.onSelect();
  }

  nameOf = (index) => NAMES[index];

  /** Ask all lanes at once; resolves when the last is over. */
  async ask(prompt, makeBody, controller) {
    this.hasRun = true;
    $("compare-prompt").textContent = prompt;
    $("compare-prompt").hidden = false;
    for (const lane of this.lanes) lane.answer = new Answer(lane.budget);
    this.show();
    const messages = [{ role: "user", content: prompt }];
    const runs = this.lanes.map(async (lane) => {
      await lane.answer.run(makeBody(messages, lane.budget), controller);
      this.#showTimes();
    });
    await Promise.all(runs);
    return this.lanes.map((lane) => lane.answer);
  }

  clear() {
    this.hasRun = false;
    $("compare-prompt").hidden = true;
    for (const lane of this.lanes) lane.answer = null;
    this.show();
  }

  show() {
    const focused = document.activeElement?.id;
    $("lanes").dataset.count = this.lanes.length;
    $("lanes").replaceChildren(...this.lanes.map((lane, index) => this.#laneElement(lane, index)));
    $("add-lane").hidden = this.lanes.length >= MAX_LANES;
    if (focused?.startsWith("lane-")) $(focused)?.focus();
    this.#showTimes();
  }

  #laneElement(lane, index) {
    const name = this.nameOf(index);
    const isSelected = index === this.selected;
    const choose = el(
      "button",
      {
        type: "button",
        class: "lane-name",
        id: `lane-${index}`,
        "aria-pressed": String(isSelected),
        title: "Edit this budget",
        onclick: () => this.select(index),
      },
      el("b", {}, name),
      el("span", { class: "lane-budget" }, summary(lane.budget)),
    );
    const drop = el(
      "button",
      { type: "button", class: "quiet icon", "aria-label": `Remove budget ${name}`, onclick: () => this.remove(index) },
      "×",
    );
    const head = el("header", {}, choose, ...(this.lanes.length > 1 ? [drop] : []));
    const content = lane.answer?.element ?? el("p", { class: "empty" }, "Its answer comes here.");
    lane.times = el("div", { class: "timebar", "aria-hidden": "true" });
    return el(
      "section",
      { class: `lane${isSelected ? " selected" : ""}`, "aria-label": `Budget ${name}` },
      head,
      lane.times,
      content,
    );
  }

  /** Bars of the total times, on one scale: how much longer one took than another. */
  #showTimes() {
    const times = this.lanes.map((lane) => lane.answer?.report?.actual_ms ?? 0);
    const longest = Math.max(...times, 0);
    this.lanes.forEach((lane, i) => {
      lane.times.style.setProperty("--share", longest ? times[i] / longest : 0);
    });
  }

  showBudget() {
    const label = $("lanes").children[this.selected]?.querySelector(".lane-budget");
    if (label) label.textContent = summary(this.lane.budget);
  }
}
