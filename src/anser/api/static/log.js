// The conversation on the page. What people and models write enters it as text nodes only, never
// as HTML, and each text in its own direction.

import { copyText } from "./call.js";
import { decimal, fill, texts, whole } from "./texts.js";

const log = document.getElementById("log");
const NEAR_END_PX = 48;

/** One message: an <article> with `who` wrote it above its `text`. */
export class Turn {
  constructor(role, who) {
    this.root = document.createElement("article");
    this.root.className = `turn ${role}`;
    this.who = this.line("who", who);
    this.text = this.line("text");
    this.thought = null;
    follow(() => log.append(this.root), true);
  }

  /** A paragraph at its end. */
  line(name, text = "") {
    const paragraph = document.createElement("p");
    paragraph.className = name;
    paragraph.dir = "auto";
    paragraph.textContent = text;
    this.root.append(paragraph);
    return paragraph;
  }

  /** Some more of the answer. */
  say(text) {
    if (this.thought && !this.text.textContent) this.thought.parentElement.open = false;
    follow(() => this.text.append(text));
  }

  /** Some more of what the model thinks before it answers. */
  think(text) {
    this.thought ??= this.#begin();
    follow(() => this.thought.append(text));
  }

  /** It is complete: who answered, what it cost, and how to get its receipt. */
  end({ node, tokens, request, text }, seconds) {
    this.busy(false);
    this.text.normalize();
    const facts = [];
    if (node) facts.push(node);
    if (tokens !== null) {
      const words = tokens === 1 ? texts.live.one_token : texts.live.tokens;
      facts.push(fill(words, { tokens: whole(tokens) }));
    }
    if (text) {
      const shown = decimal(Math.ceil(seconds * 10) / 10); // never none at all
      facts.push(fill(texts.live.seconds, { seconds: shown }));
    }
    if (request) facts.push(request);
    if (!facts.length) return;
    const line = this.line("facts", facts.join(" · "));
    if (request) line.append(" ", receiptButton(request));
    follow(() => {}, true);
  }

  /** Whether more is to come. */
  busy(is) {
    if (is) this.root.setAttribute("aria-busy", "true");
    else this.root.removeAttribute("aria-busy");
  }

  /** Take it off the page. */
  remove() {
    this.root.remove();
  }

  #begin() {
    const fold = document.createElement("details");
    fold.className = "thought";
    fold.open = true;
    fold.setAttribute("aria-live", "off"); // the answer is read out, not the way to it
    const summary = document.createElement("summary");
    summary.textContent = texts.live.thought;
    const paragraph = document.createElement("p");
    paragraph.dir = "auto";
    fold.append(summary, paragraph);
    this.text.before(fold);
    return paragraph;
  }
}

function receiptButton(request) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet small";
  button.textContent = texts.live.receipt;
  const command = `anser receipt get ${request} --url ${location.origin}`;
  button.addEventListener("click", () => void copyText(button, command));
  return button;
}

/** Change the log, and stay at its end if the reader was there. */
function follow(change, always = false) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
  change();
  if (atEnd || always) log.scrollTop = log.scrollHeight;
}
