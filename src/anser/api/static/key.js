// The visitor's key. It lives in this tab's memory and nowhere else.
//
// A key that was wrong once is not tried again: that would count as guessing.

import { texts } from "./texts.js";

const section = document.getElementById("ask");
const field = document.getElementById("key");
const trouble = document.getElementById("key-trouble");
const open = section.dataset.open === "yes";

let given = ""; // once it is typed to its end: half a key would count as guessing
let refused = "";

/** Take the key as it stands in its field; returns whether it is another one than before. */
export function takeKey() {
  const before = given;
  given = field.value.trim();
  show();
  return given !== before;
}

/** Whether the key given has turned out to be wrong. */
export const isRefused = () => given !== "" && given === refused;

/** The key to send, or an empty text. */
export const currentKey = () => (isRefused() ? "" : given);

/** Whether the platform answers this visitor: without a key, or with the one given. */
export const isOpen = () => open || currentKey() !== "";

/** The platform does not know this key. */
export function refuse(key) {
  refused = key;
  show();
}

/** Lead the visitor to where the key is typed. */
export function askForKey() {
  const fold = field.closest("details");
  if (fold) fold.open = true;
  field.focus();
}

function show() {
  trouble.textContent = isRefused() ? texts.errors.invalid_api_key : "";
  field.setAttribute("aria-invalid", String(isRefused()));
}
