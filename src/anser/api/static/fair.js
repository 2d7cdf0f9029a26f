// How evenly service goes round, and the visitor's own share: asked whenever the pool was seen.

import { currentKey } from "./key.js";
import { onNews } from "./pool.js";
import { fill, texts, whole } from "./texts.js";

const PATIENCE_MS = 5000;
const MICRO = 1e6;

const byId = (id) => document.getElementById(id);
let asking = false;

export function start() {
  onNews(() => void look());
}

async function look() {
  if (asking) return;
  asking = true;
  const key = currentKey();
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const answer = await fetch("/v1/fairness", { headers, signal, credentials: "omit" });
    if (answer.ok) show(await answer.json());
  } catch {
    // The pool's own silence is told; what stands here is as old.
  }
  asking = false;
}

function show(fairness) {
  const { members, jain, gap_micro_credits: gap, bound_micro_credits: bound } = fairness.all;
  byId("fair-members").textContent = whole(members);
  byId("fair-even").textContent = jain === null ? texts.live.nothing : jain.toFixed(3);
  byId("fair-gap").textContent = gap === null ? texts.live.nothing : credits(gap);
  const most = gap === null ? "" : fill(texts.live.at_most, { most: credits(bound) });
  byId("fair-bound").textContent = most;
  const had = part(fairness.levels, "share");
  byId("fair-own").textContent = had === null ? texts.live.nothing : percent(had);
  const due = percent(part(fairness.levels, "entitlement"));
  byId("fair-due").textContent = fill(texts.live.due, { due });
}

/** What is one's own of all: its part of its level, of that level's, and so on. */
function part(levels, name) {
  const parts = levels.map((level) => level[name]);
  return parts.includes(null) ? null : parts.reduce((all, one) => all * one, 1);
}

const credits = (micro) => whole(Math.round(micro / MICRO));
const percent = (share) => `${whole(Math.round(100 * share))} %`;
