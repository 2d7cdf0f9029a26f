// The chat box: one answer at a time; the conversation lives in this tab's memory and nowhere else.

import { askForKey, currentKey, isOpen, isRefused, takeKey } from "./key.js";
import { Turn } from "./log.js";
import * as pool from "./pool.js";
import { Refusal, ask } from "./stream.js";
import { fill, texts, whole } from "./texts.js";

const byId = (id) => document.getElementById(id);
const [log, form, message, model] = ["log", "form", "message", "model"].map(byId);
const [send, stop, clear, status, empty] = ["send", "stop", "clear", "status", "empty"].map(byId);
const SMALL = 3e9; // parameters, below which models are often wrong

let turns = []; // what the model is sent: {role, content}
let running = null; // the AbortController of the answer under way
let waits = false; // whether nothing of it has come yet
let failed = null; // the turn that says why the last question has no answer

export function start() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void submit();
  });
  message.addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // an input method's own Enter
    if (event.key !== "Enter" || event.shiftKey || composing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) halt();
  });
  stop.addEventListener("click", halt);
  clear.addEventListener("click", forget);
  model.addEventListener("change", warn);
  pool.onNews(() => waits && say(waiting()));
  warn();
}

async function submit() {
  const question = message.value.trim();
  if (running) return;
  const another = takeKey();
  if (!question) return another ? pool.look() : undefined;
  if (!(await mayAsk(another))) return;
  message.value = "";
  failed?.remove();
  failed = null;
  empty.hidden = true;
  const asked = new Turn("user", texts.live.you);
  asked.say(question);
  const turn = new Turn("assistant", model.value);
  form.scrollIntoView({ block: "nearest" });
  await converse(question, asked, turn);
}

/** Whether there is a key, if one is needed, and a model; else what is missing is said. */
async function mayAsk(another) {
  if (isOpen() && (another || !model.value)) await pool.look();
  if (isRefused()) say(texts.errors.invalid_api_key);
  else if (!isOpen()) say(texts.live.key_first);
  else if (model.value) return !running;
  else return say(texts.live.model_first);
  askForKey();
  return false;
}

async function converse(question, asked, turn) {
  running = new AbortController();
  const messages = [...turns, { role: "user", content: question }];
  const answer = { text: "", finish: null, tokens: null, node: null, request: null };
  const began = performance.now();
  begin(turn);
  try {
    const body = {
      model: model.value,
      messages,
      stream: true,
      stream_options: { include_usage: true },
    };
    for await (const part of ask({ body, key: currentKey(), signal: running.signal })) {
      take(part, answer, turn);
    }
    say(answer.text ? texts.live.finished : "");
    if (!answer.text) turn.line("trouble", texts.live.no_answer);
  } catch (error) {
    const { aborted } = running.signal;
    say(aborted ? texts.live.stopped : "");
    if (!aborted) turn.line("trouble", reason(error));
    if (!answer.text) giveBack(question, asked, turn, aborted);
  }
  const seconds = (performance.now() - began) / 1000;
  if (answer.text) turns = [...messages, { role: "assistant", content: answer.text }];
  turn.end(answer, seconds);
  if (answer.finish === "length") turn.line("facts", texts.live.cut);
  end();
}

/** One piece of the answer: its head, some thought or text, or what it has cost. */
function take({ headers, chunk }, answer, turn) {
  if (headers) {
    answer.node = headers.get("x-anser-node");
    answer.request = headers.get("x-request-id");
    return;
  }
  if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  answer.finish = choice.finish_reason ?? answer.finish;
  const { content, reasoning, reasoning_content } = choice.delta ?? {};
  const thought = reasoning ?? reasoning_content; // engines differ
  if (typeof thought === "string" && thought) {
    come(texts.live.thinking);
    turn.think(thought);
  }
  if (typeof content === "string" && content) {
    come(texts.live.answering);
    answer.text += content;
    turn.say(content);
  }
}

function come(text) {
  waits = false;
  say(text);
}

/** What is known of why nothing has come yet. */
function waiting() {
  const state = pool.latest();
  const chosen = state?.models.find((each) => each.id === model.value);
  if (chosen && !chosen.ready) return texts.live.not_ready_yet;
  if (state?.queued > 0) return fill(texts.live.in_line, { count: whole(state.queued) });
  return texts.live.first_word;
}

function begin(turn) {
  turn.busy(true);
  stop.hidden = clear.hidden = false;
  if (document.activeElement === send) stop.focus(); // a hidden button would lose it
  send.hidden = clear.disabled = true;
  waits = true;
  say(waiting());
}

function end() {
  running = null;
  waits = false;
  const stopHadFocus = document.activeElement === stop;
  send.hidden = clear.disabled = false;
  stop.hidden = true;
  if (stopHadFocus) message.focus();
}

/** A question without an answer goes back into its box, unless that holds the next one already. */
function giveBack(question, asked, turn, stopped) {
  if (message.value) return;
  message.value = question;
  asked.remove();
  if (stopped) turn.remove();
  else failed = turn;
  empty.hidden = log.children.length > 1;
}

/** In words, why there is no answer. */
function reason(error) {
  const refusal = error instanceof Refusal ? error : new Refusal("broken_off");
  const code = Object.hasOwn(texts.errors, refusal.code) ? refusal.code : "refused";
  return fill(texts.errors[code], { message: refusal.message });
}

function halt() {
  running?.abort();
}

function forget() {
  turns = [];
  failed = null;
  log.replaceChildren(empty);
  empty.hidden = false;
  clear.hidden = true;
  say("");
  message.focus();
}

/** Small models, as far as their names tell, come with a warning. */
function warn() {
  const [, number, unit] = /(?:^|[-_:. /])([\d.]+)([mb])(?=$|[-_:. /])/i.exec(model.value) ?? [];
  const parameters = Number(number) * (unit?.toLowerCase() === "m" ? 1e6 : 1e9);
  byId("small").hidden = !(parameters < SMALL);
}

function say(text) {
  if (status.textContent !== text) status.textContent = text;
}
