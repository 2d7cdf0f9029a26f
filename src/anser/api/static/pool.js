// The pool's state, asked every two seconds while somebody looks.

import { currentKey, isOpen, refuse, takeKey } from "./key.js";
import { decimal, fill, texts, whole } from "./texts.js";

const INTERVAL_MS = 2000;
const PATIENCE_MS = 5000;
const MISSES_MAX = 3; // after which the figures are called old
const GEESE_MAX = 24; // of one node
const ROWS_MAX = 40; // of nodes, and of models; page.py has the same
const FOLD = 8; // models that are seen at once; page.py has the same
const TRACE_POINTS = 60;
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const trace = [];
const listeners = [];
let timer = null;
let misses = 0;
let shown = "";
let state = null;

export function start() {
  document.addEventListener("visibilitychange", look);
  byId("key").addEventListener("change", () => {
    if (takeKey()) void look();
  });
  takeKey(); // a browser may have kept it over a reload
  void look();
}

/** The pool as it was seen last, or null. */
export const latest = () => state;

/** Be told whenever the pool has been seen. */
export const onNews = (listener) => listeners.push(listener);

/** Ask now, and again after a while, unless nobody looks or no key lets us. */
export async function look() {
  clearTimeout(timer);
  if (document.visibilityState !== "visible") return;
  if (isOpen()) await poll();
  else hide();
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
    else if (answer.status === 401 && key) await wrong(key);
  } catch {
    misses += 1;
  }
  byId("pool-away").hidden = misses < MISSES_MAX;
  byId("pool-away").textContent = misses < MISSES_MAX ? "" : texts.live.pool_away;
}

/** Without its wrong key the visitor sees what everybody does. */
async function wrong(key) {
  refuse(key);
  misses = 0;
  if (isOpen()) await poll();
  else hide();
}

function hide() {
  state = null;
  shown = "";
  byId("pool-state").hidden = true;
  byId("pool-closed").hidden = false;
  fillChoices([], null);
}

function show(pool) {
  state = pool;
  byId("pool-state").hidden = false;
  byId("pool-closed").hidden = true;
  figures(pool);
  const lists = JSON.stringify([pool.nodes, pool.models]);
  if (lists !== shown) {
    shown = lists;
    byId("nodes").replaceChildren(...pool.nodes.slice(0, ROWS_MAX).map(nodeRow));
    fillModels(pool.models);
    more("nodes", pool.nodes.length);
    more("models", pool.models.length);
    fillChoices(pool.models, pool.default_model);
  }
  for (const listener of listeners) listener();
}

function figures(pool) {
  byId("ready").textContent = whole(pool.nodes_ready);
  byId("ready-of").textContent = fill(texts.live.of, { total: whole(pool.nodes.length) });
  byId("running").textContent = whole(pool.running);
  byId("running-of").textContent = fill(texts.live.of, { total: whole(pool.slots) });
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

/** The first models, and the others folded away. */
function fillModels(models) {
  const rows = models.slice(0, ROWS_MAX).map(modelRow);
  byId("models").replaceChildren(...rows.slice(0, FOLD));
  byId("folded").replaceChildren(...rows.slice(FOLD));
  byId("fold").hidden = rows.length <= FOLD;
  byId("fold-count").textContent = fill(texts.live.fold, { count: whole(models.length - FOLD) });
}

function more(id, count) {
  byId(`no-${id}`).hidden = count > 0;
  const line = byId(`more-${id}`);
  line.hidden = count <= ROWS_MAX;
  line.textContent = fill(texts.live.more, { count: whole(count - ROWS_MAX) });
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
  row.dataset.ready = model.ready ? "yes" : "no";
  put("name", model.id);
  const on = model.nodes_ready === 1 ? texts.live.on_node : texts.live.on_nodes;
  const length = model.context_length;
  const parts = [
    chats(model) ? "" : texts.live.embeddings,
    length ? fill(texts.live.context, { tokens: whole(length) }) : "",
    model.ready ? fill(on, { count: whole(model.nodes_ready) }) : texts.live.not_ready,
  ];
  put("detail", parts.filter(Boolean).join(" · "));
  return row;
}

const chats = (model) => model.capabilities.includes("chat");

/** The models that can be talked to; the chosen one is kept if it is still there. */
function fillChoices(models, preferred) {
  const choice = byId("model");
  const before = choice.value;
  const able = models.filter(chats);
  const wanted = able.some((model) => model.id === before) ? before : preferred;
  const options = able.map((model) => {
    const text = model.ready ? model.id : fill(texts.live.choice_away, { model: model.id });
    const option = new Option(text, model.id, false, model.id === wanted);
    option.disabled = !model.ready;
    return option;
  });
  if (!options.length) options.push(new Option(texts.live.no_choice, ""));
  const differs = (option, at) => !option.isEqualNode(choice.options[at]);
  if (options.length !== choice.options.length || options.some(differs)) {
    choice.replaceChildren(...options);
    choice.value = wanted ?? "";
  }
  choice.disabled = able.length === 0;
  if (choice.value !== before) choice.dispatchEvent(new Event("change"));
}
