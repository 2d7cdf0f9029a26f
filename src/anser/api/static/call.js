// How to call it: tabs, copying, and snippets for this address and the chosen model.

import { texts } from "./texts.js";

const byId = (id) => document.getElementById(id);
const SHOWN_MS = 2000;

export function start() {
  ownAddress();
  byId("model").addEventListener("change", ownModel);
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  for (const tab of tabs) {
    tab.addEventListener("click", () => choose(tabs, tab));
    tab.addEventListener("keydown", (event) => walk(event, tabs, tab));
  }
  for (const button of document.querySelectorAll("[data-copy]")) {
    const source = byId(button.dataset.copy);
    button.addEventListener("click", () => void copyText(button, source.textContent, source));
  }
}

/** Copy a text, and say so on the button; where that cannot be, select its source instead. */
export async function copyText(button, text, source = null) {
  const label = button.firstChild;
  const before = (button.dataset.label ??= label.data);
  try {
    await navigator.clipboard.writeText(text);
    label.data = texts.live.copied;
  } catch {
    if (source) getSelection().selectAllChildren(source);
    label.data = source ? texts.live.not_copied : text; // no clipboard without TLS
    if (!source) return;
  }
  setTimeout(() => (label.data = before), SHOWN_MS);
}

/** Behind a proxy the server may know another address than the one that works from here. */
function ownAddress() {
  const told = byId("address").textContent.replace(/\/v1$/, "");
  if (told === location.origin) return;
  const walker = document.createTreeWalker(byId("main"), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest("code")) {
      node.data = node.data.replaceAll(told, location.origin);
    }
  }
}

/** The chosen model in each snippet, quoted as page.py quotes it. */
function ownModel() {
  const name = byId("model").value;
  if (!name) return;
  const literal = JSON.stringify(name);
  for (const place of document.querySelectorAll("[data-model]")) {
    const inShell = place.dataset.model === "curl";
    place.textContent = inShell ? literal.replaceAll("'", `'"'"'`) : literal;
  }
}

function choose(tabs, chosen) {
  for (const tab of tabs) {
    const is = tab === chosen;
    tab.setAttribute("aria-selected", String(is));
    tab.tabIndex = is ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).classList.toggle("chosen", is);
  }
}

/** Arrow keys, Home and End, as the WAI-ARIA tabs pattern has them. */
function walk(event, tabs, tab) {
  const at = tabs.indexOf(tab);
  const goals = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 };
  if (!(event.key in goals)) return;
  event.preventDefault();
  const goal = tabs[(goals[event.key] + tabs.length) % tabs.length];
  choose(tabs, goal);
  goal.focus();
}
