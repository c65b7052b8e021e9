// The conversation: turns so far, and the next answer.

import { Answer } from "./answer.js";
import { $, el } from "./dom.js";
import { summary } from "./budget.js";

export class Chat {
  constructor() {
    this.turns = [];
  }

  get isEmpty() {
    return this.turns.length === 0;
  }

  clear() {
    this.turns = [];
    $("thread").replaceChildren();
  }

  /** Ask the next thing; `makeBody(messages)` makes the request. */
  async ask(prompt, budget, makeBody, controller) {
    const answer = new Answer(budget);
    $("thread").append(
      el("p", { class: "turn-user" }, prompt),
      el("p", { class: "turn-budget" }, `Budget: ${summary(budget)}`),
      answer.element,
    );
    const question = { role: "user", content: prompt };
    await answer.run(makeBody([...this.turns, question]), controller);
    // What the model has not said is not part of what it said: no answer, no turn.
    if (answer.text) this.turns.push(question, { role: "assistant", content: answer.text });
    return answer;
  }
}
