// The pool's state, asked every two seconds while somebody looks.

import { currentKey, isOpen } from "./chat.js";
import { decimal, fill, texts, whole } from "./texts.js";

const INTERVAL_MS = 2000;
const PATIENCE_MS = 5000;
const MISSES_MAX = 3; // after which the figures are called old
const GEESE_MAX = 24; // of one node
const ROWS_MAX = 40; // of nodes, and of models; page.py has the same
const TRACE_POINTS = 60;
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const trace = [];
let timer = null;
let misses = 0;
let shown = "";
let refused = null; // a key that was wrong once is not tried again: that would count as guessing

export function start() {
  document.addEventListener("visibilitychange", look);
  byId("key").addEventListener("change", look);
  look();
}

/** Ask now, and again after a while, unless nobody looks or no key lets us. */
async function look() {
  clearTimeout(timer);
  if (document.visibilityState !== "visible") return;
  if (isOpen() && currentKey() !== refused) await poll();
  clearTimeout(timer); // another look may have begun meanwhile
  timer = setTimeout(look, INTERVAL_MS);
}

async function poll() {
  const key = currentKey();
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const answer = await fetch("/v1/pool", { headers, signal, credentials: "omit" });
    misses = answer.ok ? 0 : misses + 1;
    if (answer.ok) show(await answer.json());
    else if (answer.status === 401) refuse(key);
  } catch {
    misses += 1;
  }
  byId("pool-away").hidden = misses < MISSES_MAX;
  byId("pool-away").textContent = misses < MISSES_MAX ? "" : texts.live.pool_away;
}

function refuse(key) {
  refused = key;
  misses = 0;
  byId("pool-state").hidden = true;
  byId("pool-closed").hidden = false;
}

function show(pool) {
  byId("pool-state").hidden = false;
  byId("pool-closed").hidden = true;
  figures(pool);
  const lists = JSON.stringify([pool.nodes, pool.models]);
  if (lists === shown) return;
  shown = lists;
  fillList("nodes", pool.nodes, nodeRow);
  fillList("models", pool.models, modelRow);
  fillChoices(pool.models);
}

function figures(pool) {
  const slots = pool.nodes.reduce((sum, node) => sum + (node.slots ?? 0), 0);
  const ready = pool.nodes.filter((node) => node.state === "up").length;
  byId("ready").textContent = whole(ready);
  byId("ready-of").textContent = fill(texts.live.of, { total: whole(pool.nodes.length) });
  byId("running").textContent = whole(pool.running);
  byId("running-of").textContent = fill(texts.live.of, { total: whole(slots) });
  byId("queued").textContent = whole(pool.queued);
  byId("pace").textContent = decimal(pool.tokens_per_s);
  trace.push(pool.tokens_per_s);
  if (trace.length > TRACE_POINTS) trace.shift();
  draw();
}

function draw() {
  const top = Math.max(...trace, 1);
  const points = trace.map((pace, at) => {
    const x = 120 - ((trace.length - 1 - at) * 120) / (TRACE_POINTS - 1);
    return `${x.toFixed(1)},${(22 - (20 * pace) / top).toFixed(1)}`;
  });
  byId("trace").firstElementChild.setAttribute("points", points.join(" "));
}

function fillList(id, items, row) {
  byId(id).replaceChildren(...items.slice(0, ROWS_MAX).map(row));
  byId(`no-${id}`).hidden = items.length > 0;
  const more = byId(`more-${id}`);
  more.hidden = items.length <= ROWS_MAX;
  more.textContent = fill(texts.live.more, { count: whole(items.length - ROWS_MAX) });
}

function blank(id) {
  const row = byId(id).content.firstElementChild.cloneNode(true);
  const put = (field, text) => {
    row.querySelector(`[data-field="${field}"]`).textContent = text;
  };
  return { row, put };
}

function nodeRow(node) {
  const { row, put } = blank("node-row");
  row.dataset.state = node.state;
  put("name", node.id);
  put("state", texts.states[node.state] ?? node.state);
  put("engine", node.engine ?? "");
  const known = { running: whole(node.busy), slots: whole(node.slots ?? 0) };
  put("count", node.slots ? fill(texts.live.slots, known) : "");
  const slots = Math.min(node.slots ?? 0, GEESE_MAX);
  const geese = Array.from({ length: slots }, (_, at) => goose(at < node.busy));
  row.querySelector('[data-field="geese"]').replaceChildren(...geese);
  return row;
}

function goose(flying) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("class", flying ? "goose flying" : "goose");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", "#goose");
  picture.append(use);
  return picture;
}

function modelRow(model) {
  const { row, put } = blank("model-row");
  put("name", model.id);
  const on = model.nodes === 1 ? texts.live.on_node : texts.live.on_nodes;
  const parts = [fill(on, { count: whole(model.nodes) })];
  if (model.context_length) {
    parts.unshift(fill(texts.live.context, { tokens: whole(model.context_length) }));
  }
  put("detail", parts.join(" · "));
  return row;
}

/** The models that can be asked, the chosen one kept if it is still there. */
function fillChoices(models) {
  const choice = byId("model");
  const names = models.map((model) => model.id);
  const now = Array.from(choice.options, (option) => option.value);
  if (names.join("\n") === now.join("\n")) return;
  const chosen = choice.value;
  choice.replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(chosen)) choice.value = chosen;
}
