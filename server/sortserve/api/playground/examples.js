// What to click first: three questions, and the budgets that a comparison begins with.

import { maxTokens } from "./budget.js";
import { $, el, ms } from "./dom.js";
import { exits, timeAt } from "./exits.js";

const openExits = () => exits.list.filter((exit) => exit.served_unasked);

/** The time of the deepest exit but one: enough for it, and too little for full depth. */
function timeBelowFull() {
  const [shallow, deep] = openExits().slice(-2);
  if (!deep?.estimate) return null;
  const time = timeAt(shallow, maxTokens());
  const unit = 10 ** Math.max(0, Math.floor(Math.log10(time)) - 1); // two digits are enough
  return { time: Math.ceil(time / unit) * unit, exit: shallow.exit_layer };
}

/** No limit, a time, and the two deepest exits below full depth: as far as there are such. */
export function suggestedBudgets() {
  const below = timeBelowFull();
  const shallower = openExits().slice(0, -1).slice(-2).reverse();
  return [
    {},
    ...(below ? [{ latency_ms: below.time }] : []),
    ...shallower.map((exit) => ({ exit_layer: exit.exit_layer })),
  ];
}

function examples() {
  const below = timeBelowFull();
  const timed = below && {
    title: `At most ${ms(below.time)}`,
    prompt: "Why is the sky blue?",
    note: `Buys about exit ${below.exit} at this moment`,
    mode: "chat",
    budget: { latency_ms: below.time },
  };
  return [
    {
      title: "No limit",
      prompt: "What is gravity?",
      note: `Every token at full depth, all ${exits.full} layers`,
      mode: "chat",
      budget: {},
    },
    ...(timed ? [timed] : []),
    {
      title: "Side by side",
      prompt: "Name three uses of copper.",
      note: "One question at several budgets, in one batch",
      mode: "compare",
      budget: null, // each lane has its own
    },
  ];
}

/** Show them; `choose(example)` is called with the one that is clicked. */
export function showExamples(choose) {
  const cards = examples().map((example) =>
    el(
      "button",
      { type: "button", class: "example", onclick: () => choose(example) },
      el("b", {}, example.title),
      el("span", { class: "quote" }, example.prompt),
      el("span", { class: "note" }, example.note),
    ),
  );
  $("examples").replaceChildren(...cards.map((card) => el("li", {}, card)));
}
