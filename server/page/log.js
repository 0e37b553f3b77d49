// The messages of a conversation as they are shown, each with what may be done with it. It changes no conversation.

import { copyText, Writer } from "./markdown.js";
import { isUnanswered } from "./turns.js";

const log = document.getElementById("log");
const shown = new Map();           // message -> its parts

export function make(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

export function button(text, action) {
  const made = make("button", "plain small", text);
  made.type = "button";
  made.addEventListener("click", () => action(made));
  return made;
}

export function atEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

export function toEnd() {
  log.scrollTop = log.scrollHeight;
}

/** One more message at the end of the log. again(message) is what its button does. */
export function show(message, again) {
  const whole = make("article", `message ${message.role}`);
  const words = make("div", "words");
  const wrong = make("p", "wrong");
  const tools = make("div", "tools");
  const parts = { whole, words, wrong, tools, again: button("Again", () => again(message)) };
  wrong.hidden = parts.again.hidden = true;
  if (message.role === "user") {
    words.textContent = message.content;
    tools.append(parts.again);
  } else {
    parts.thoughts = make("div", "", message.reasoning);
    parts.thinking = make("details", "thinking");
    parts.thinking.append(make("summary", "", "Thinking"), parts.thoughts);
    parts.thinking.hidden = !message.reasoning;
    parts.writer = new Writer(words);
    tools.append(button("Copy", (pressed) => copyText(message.content, pressed)), parts.again);
    whole.append(parts.thinking);
  }
  whole.append(words, wrong, tools);
  log.append(whole);
  shown.set(message, parts);
  return parts;
}

export function busy(parts, is) {
  parts.whole.classList.toggle("busy", is);
  parts.whole.ariaBusy = String(is);         // read aloud once it is there, not word by word
  if (!is) parts.writer.end();
}

export function drop(message) {
  shown.get(message)?.whole.remove();
  shown.delete(message);
}

export function showAll(messages, again) {
  log.replaceChildren();
  shown.clear();
  for (const message of messages) {
    const { writer } = show(message, again);
    writer?.push(message.content);
    writer?.end();
  }
}

/** Say what went wrong with each message, and offer Again where it can be had: the last answer, each question without one. */
export function refresh(messages, running) {
  messages.forEach((message, index) => {
    const parts = shown.get(message);
    if (!parts) return;
    const last = index === messages.length - 1;
    const unanswered = isUnanswered(messages, index) && !(running && last);
    parts.wrong.textContent = message.note ?? (unanswered ? "Not answered." : "");
    parts.wrong.hidden = !parts.wrong.textContent;
    parts.again.hidden = running || !(unanswered || (last && message.role === "assistant"));
    parts.tools.hidden = message.role === "user" && parts.again.hidden;
  });
}
