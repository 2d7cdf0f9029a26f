// The chat box. What people and models write enters the page as text nodes only, never as HTML.
//
// One answer at a time; the conversation and the key live in this tab's memory and nowhere else.

import { Refusal, ask } from "./stream.js";
import { decimal, fill, texts, whole } from "./texts.js";

const byId = (id) => document.getElementById(id);
const section = byId("ask");
const [log, form, message, model, key] = ["log", "form", "message", "model", "key"].map(byId);
const [send, stop, clear, status, empty] = ["send", "stop", "clear", "status", "empty"].map(byId);

let turns = []; // what the model is sent: {role, content}
let running = null; // the AbortController of the answer under way
let given = ""; // the key, once it is typed to its end: half a key would count as guessing

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
  section.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) halt();
  });
  stop.addEventListener("click", halt);
  clear.addEventListener("click", forget);
  key.addEventListener("change", takeKey);
  takeKey();
}

/** Whether the platform answers this visitor: without a key, or with the one given. */
export const isOpen = () => section.dataset.open === "yes" || given !== "";

/** The key that the visitor has given, or an empty text. */
export const currentKey = () => given;

function takeKey() {
  given = key.value.trim();
}

async function submit() {
  const question = message.value.trim();
  if (running || !question) return;
  takeKey();
  if (!isOpen()) {
    key.closest("details").open = true;
    key.focus();
    return say(texts.live.key_first);
  }
  if (!model.value) return say(texts.live.model_first);
  message.value = "";
  show("user", texts.live.you).text.textContent = question;
  const turn = show("assistant", model.value);
  form.scrollIntoView({ block: "nearest" });
  await converse(question, turn);
}

async function converse(question, turn) {
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
    say(texts.live.finished);
  } catch (error) {
    if (running.signal.aborted) say(texts.live.stopped);
    else trouble(error, turn);
  }
  const seconds = (performance.now() - began) / 1000;
  running = null;
  if (answer.text) turns = [...messages, { role: "assistant", content: answer.text }];
  else if (!message.value) message.value = question;
  end(turn, answer, seconds);
}

/** One piece of the answer: its head, some text, or what it has cost. */
function take({ headers, chunk }, answer, turn) {
  if (headers) {
    answer.node = headers.get("x-anser-node");
    answer.request = headers.get("x-request-id");
    return say(texts.live.answering);
  }
  if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  answer.finish = choice.finish_reason ?? answer.finish;
  const text = choice.delta?.content;
  if (typeof text !== "string" || !text) return;
  answer.text += text;
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
  turn.text.append(text);
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function begin(turn) {
  turn.root.setAttribute("aria-busy", "true");
  send.hidden = true;
  stop.hidden = clear.hidden = false;
  clear.disabled = true;
  say(texts.live.waiting);
}

function end(turn, answer, seconds) {
  turn.root.removeAttribute("aria-busy");
  turn.text.normalize();
  const facts = [];
  if (answer.node) facts.push(answer.node);
  if (answer.tokens !== null) facts.push(fill(texts.live.tokens, { tokens: whole(answer.tokens) }));
  if (answer.text) facts.push(fill(texts.live.seconds, { seconds: decimal(seconds) }));
  if (answer.request) facts.push(answer.request);
  if (facts.length) line(turn, "facts", facts.join(" · "));
  if (answer.finish === "length") line(turn, "facts", texts.live.cut);
  const stopHadFocus = document.activeElement === stop;
  stop.hidden = true;
  send.hidden = clear.disabled = false;
  if (stopHadFocus) message.focus();
  log.scrollTop = log.scrollHeight;
}

/** Say in words why there is no answer, next to where it would have been. */
function trouble(error, turn) {
  const refusal = error instanceof Refusal ? error : new Refusal("broken_off");
  const code = Object.hasOwn(texts.errors, refusal.code) ? refusal.code : "refused";
  line(turn, "trouble", fill(texts.errors[code], { message: refusal.message }));
  say("");
}

function halt() {
  running?.abort();
}

function forget() {
  turns = [];
  log.replaceChildren(empty);
  empty.hidden = false;
  clear.hidden = true;
  say("");
  message.focus();
}

function show(role, who) {
  const root = document.createElement("article");
  root.className = `turn ${role}`;
  const turn = { root };
  turn.who = line(turn, "who", who);
  turn.text = line(turn, "text", "");
  empty.hidden = true;
  log.append(root);
  log.scrollTop = log.scrollHeight;
  return turn;
}

function line(turn, name, text) {
  const paragraph = document.createElement("p");
  paragraph.className = name;
  paragraph.textContent = text;
  turn.root.append(paragraph);
  return paragraph;
}

function say(text) {
  status.textContent = text;
}
