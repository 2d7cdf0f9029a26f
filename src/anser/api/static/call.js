// How to call it: tabs, copying, and the address as this browser reaches it.

import { texts } from "./texts.js";

const byId = (id) => document.getElementById(id);
const SHOWN_MS = 2000;

export function start() {
  ownAddress();
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  for (const tab of tabs) {
    tab.addEventListener("click", () => choose(tabs, tab));
    tab.addEventListener("keydown", (event) => walk(event, tabs, tab));
  }
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => void copy(button));
  }
}

/** Behind a proxy the server may know another address than the one that works from here. */
function ownAddress() {
  const told = byId("address").textContent.replace(/\/v1$/, "");
  if (told === location.origin) return;
  for (const code of document.querySelectorAll(".call code")) {
    code.textContent = code.textContent.replaceAll(told, location.origin);
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

async function copy(button) {
  const source = byId(button.dataset.copy);
  const label = button.firstChild;
  const before = (button.dataset.label ??= label.data);
  try {
    await navigator.clipboard.writeText(source.textContent);
    label.data = texts.live.copied;
  } catch {
    getSelection().selectAllChildren(source); // no clipboard without TLS: leave it to the keys
    label.data = texts.live.not_copied;
  }
  setTimeout(() => (label.data = before), SHOWN_MS);
}
