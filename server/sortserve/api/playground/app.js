// The page: puts its parts together, and sends what the reader asks for.

import { errorBox } from "./answer.js";
import { ApiError, get, isThere, key } from "./api.js";
import {
  maxTokens, offerExits, readBudget, readSampling, showSlider, slid, summary, writeBudget,
} from "./budget.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { $, announce, el } from "./dom.js";
import { showExamples, suggestedBudgets } from "./examples.js";
import { showLegend, showTable, useExits } from "./exits.js";
import { curl, python } from "./snippets.js";
import { startStrip } from "./strip.js";

const REFRESH_MS = 5000; // the times of the exits change with the load
const RETRY_MS = 2000; // a server that is not ready yet
const MAX_SUMMARY_CHARS = 40;

const chat = new Chat();
const compare = new Compare(() => showMode());
let chatBudget = {};
let running = null; // the AbortController of what runs
let lastPrompt = "";
let isStarted = false;

// ---- mode and budget ----

const mode = () => document.querySelector("input[name=mode]:checked").value;
const isCompare = () => mode() === "compare";
const currentBudget = () => (isCompare() ? compare.lane.budget : chatBudget);

function setMode(value) {
  document.querySelector(`input[name=mode][value=${value}]`).checked = true;
  showMode();
}

function showMode() {
  const isWelcome = !isCompare() && chat.isEmpty && !$("thread").childElementCount;
  $("welcome").hidden = !isWelcome;
  $("thread").hidden = isCompare() || isWelcome;
  $("compare").hidden = !isCompare();
  const lane = isCompare() ? ` ${compare.nameOf(compare.selected)}` : "";
  for (const id of ["lane-name", "pill-lane"]) $(id).textContent = lane;
  $("new-button").textContent = isCompare() ? "Clear" : "New chat";
  $("prompt").placeholder = isCompare() ? "Ask once, answered at every budget" : "Ask something";
  writeBudget(currentBudget());
  showSummary();
  if (!running) $("send-button").textContent = isCompare() ? "Compare" : "Send";
}

function budgetChanged() {
  const budget = readBudget();
  if (isCompare()) {
    compare.lane.budget = budget;
    compare.showBudget();
  } else {
    chatBudget = budget;
  }
  showSlider(budget);
  showSummary();
}

function showSummary() {
  const text = summary(currentBudget());
  $("budget-summary").textContent =
    text.length > MAX_SUMMARY_CHARS ? `${text.slice(0, MAX_SUMMARY_CHARS)}…` : text;
}

// ---- asking ----

/** A request as the form says; `messages` are the turns. */
function makeBody(messages, budget) {
  const system = $("system").value.trim();
  const turns = system ? [{ role: "system", content: system }, ...messages] : messages;
  const body = { messages: turns, ...readSampling() };
  return Object.keys(budget).length ? { ...body, budget } : body;
}

async function send() {
  const prompt = $("prompt").value.trim();
  if (!prompt || running) return;
  lastPrompt = prompt;
  $("prompt").value = "";
  grow();
  const controller = new AbortController();
  setRunning(controller);
  const asked = isCompare()
    ? compare.ask(prompt, makeBody, controller)
    : chat.ask(prompt, chatBudget, (turns) => makeBody(turns, chatBudget), controller).then((a) => [a]);
  showMode();
  $("scroller").scrollTop = isCompare() ? 0 : $("scroller").scrollHeight;
  try {
    finished(await asked);
  } finally {
    setRunning(null);
  }
  refreshExits();
}

function finished(answers) {
  announce(answers.map((answer) => answer.spoken).join(" "));
  const errors = answers.map((answer) => answer.error).filter((error) => error);
  if (errors.length === answers.length && !$("prompt").value) $("prompt").value = lastPrompt;
  const locked = errors.find((error) => error.status === 401);
  if (locked) askForKey(locked.message);
}

function setRunning(controller) {
  running = controller;
  const isRunning = controller !== null;
  const hadFocus = document.activeElement === $("stop-button");
  $("stop-button").hidden = !isRunning;
  $("send-button").hidden = isRunning;
  for (const input of document.querySelectorAll("input[name=mode]")) input.disabled = isRunning;
  for (const id of ["new-button", "add-lane"]) $(id).disabled = isRunning;
  if (isRunning) announce("The answer is coming.");
  else if (hadFocus) $("prompt").focus();
}

/** Follow the answer down, unless the reader has scrolled up. */
function follow() {
  const scroller = $("scroller");
  let isAtEnd = true;
  scroller.addEventListener("scroll", () => {
    isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  });
  new ResizeObserver(() => {
    if (isAtEnd && !isCompare()) scroller.scrollTop = scroller.scrollHeight;
  }).observe($("thread"));
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 180)}px`;
}

// ---- what is known of the server ----

async function refreshExits() {
  try {
    useExits(await get("exits"));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    return error;
  }
  offerExits();
  showLegend();
  showTable(maxTokens());
  showSlider(currentBudget());
  return null;
}

async function start() {
  const error = await refreshExits();
  if (error?.status === 401) {
    askForKey(error.message);
    return;
  }
  if (error) {
    const loading = el("p", {}, "The model is loading. This page goes on by itself when it is there.");
    const notice = error.code === "loading" ? loading : errorBox(error);
    $("examples").replaceChildren(el("li", { class: "notice" }, notice));
    setTimeout(start, RETRY_MS);
    return;
  }
  if (!compare.lanes.length) compare.suggest(suggestedBudgets());
  showExamples(choose);
  showMode();
  if (isStarted) return; // only the key is another one
  isStarted = true;
  startStrip();
  isThere("docs").then((is) => ($("docs-link").hidden = !is)); // off with --no-enable-docs
  setInterval(() => {
    if (!document.hidden && !running) refreshExits();
  }, REFRESH_MS);
}

function choose({ prompt, mode: where, budget }) {
  if (budget) chatBudget = budget;
  setMode(where);
  $("prompt").value = prompt;
  send();
}

// ---- the key ----

function askForKey(message) {
  $("key-message").textContent = message;
  $("key").value = key.get();
  $("key-dialog").showModal();
}

$("key-dialog").addEventListener("close", () => {
  const { returnValue } = $("key-dialog");
  $("key-dialog").returnValue = "";
  if (returnValue !== "use") return;
  key.set($("key").value.trim());
  start();
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close("cancel"));
$("key-forget").addEventListener("click", () => {
  key.set("");
  $("key").value = "";
});
$("key-button").addEventListener("click", () => askForKey("Where the server has keys, what you ask needs one."));

// ---- code ----

function showCode() {
  const prompt = $("prompt").value.trim() || lastPrompt || "What is gravity?";
  const turns = isCompare() ? [] : chat.turns.slice(0, -2);
  const before = $("prompt").value.trim() && !isCompare() ? chat.turns : turns;
  const body = makeBody([...before, { role: "user", content: prompt }], currentBudget());
  const language = document.querySelector("input[name=language]:checked").value;
  $("code-text").textContent = language === "curl" ? curl(body) : python(body);
  $("copy-status").textContent = "";
}

$("code-button").addEventListener("click", () => {
  showCode();
  $("code-dialog").showModal();
});
for (const input of document.querySelectorAll("input[name=language]")) {
  input.addEventListener("change", showCode);
}
$("copy-button").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("code-text").textContent);
    $("copy-status").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren($("code-text")); // no clipboard without HTTPS
    $("copy-status").textContent = "Selected: copy it with the keyboard.";
  }
});

// ---- the rest of the page ----

function showTheme() {
  const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  $("theme-button").setAttribute("aria-label", `Switch to ${other} colours`);
}

$("theme-button").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("sortserve.theme", theme);
  showTheme();
});

// On a narrow screen the panel lies over the page; on a wide one it is always beside it.
const narrow = matchMedia("(max-width: 900px)");

function openPanel(isOpen) {
  $("panel").classList.toggle("open", isOpen);
  $("budget-button").setAttribute("aria-expanded", String(isOpen || !narrow.matches));
  (isOpen ? $("latency-slider") : $("budget-button")).focus();
}

narrow.addEventListener("change", () => openPanel(false));
$("budget-button").addEventListener("click", () => openPanel(true));
$("close-panel").addEventListener("click", () => openPanel(false));
$("panel").addEventListener("keydown", (event) => {
  if (event.key === "Escape" && narrow.matches) openPanel(false);
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
});
$("stop-button").addEventListener("click", () => running?.abort());
$("new-button").addEventListener("click", () => {
  (isCompare() ? compare : chat).clear();
  showMode();
  $("prompt").focus();
});
$("add-lane").addEventListener("click", () => compare.add({ ...compare.lane.budget }));
for (const input of document.querySelectorAll("input[name=mode]")) {
  input.addEventListener("change", () => {
    if (isCompare()) compare.show();
    showMode();
  });
}
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("input", (event) => {
  if (event.target.id === "latency-slider") slid();
  if (event.target.id === "max_tokens") showTable(maxTokens());
  budgetChanged();
});
$("reset-button").addEventListener("click", () => {
  writeBudget({});
  budgetChanged();
});

showTheme();
follow();
$("budget-button").setAttribute("aria-expanded", String(!narrow.matches));
if (!narrow.matches) $("prompt").focus();
start();
