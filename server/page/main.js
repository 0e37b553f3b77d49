// The page: what stands where, and what a press of a button does. Asking is in api.js, watching the server in watch.js,
// remembering in store.js, the messages in log.js, the settings in settings.js.

import { answer } from "./api.js";
import { atEnd, busy, button, drop, make, refresh, show, showAll, toEnd } from "./log.js";
import { inWords, measured } from "./numbers.js";
import { reloadSettings, settings, startSettings } from "./settings.js";
import { forget, forgetAll, keep, listen, loadConversations, newConversation } from "./store.js";
import { turns } from "./turns.js";
import { look, refuse, servedModel, startWatch, watchAnew } from "./watch.js";

const TITLE = 60;

const at = (id) => document.getElementById(id);
let conversations = sorted(loadConversations());
let current = conversations[0] ?? newConversation();
let running = null;                // the AbortController of the answer that is being written to `current`

function sorted(all) {
  return all.sort((one, other) => other.at - one.at);
}

// ---- showing ---------------------------------------------------------------------------------------------------------

function note(text) {
  at("note").textContent = text;
}

function showConversation() {
  showAll(current.messages, again);
  refresh(current.messages, running !== null);
  showNumbers();
  toEnd();
}

function showList() {
  const items = sorted(conversations).map((one) => {
    const item = document.createElement("li");
    item.setAttribute("aria-current", String(one === current));
    const title = make("button", "title", one.title);
    title.type = "button";
    title.addEventListener("click", () => open(one));
    const gone = button("✕", () => remove(one));
    gone.setAttribute("aria-label", `Delete ${one.title}`);
    item.append(title, gone);
    return item;
  });
  at("conversations").replaceChildren(...items);
}

function showNumbers() {
  at("numbers").textContent = inWords(current.numbers, servedModel());
}

function showRunning() {
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  refresh(current.messages, running !== null);
}

// ---- conversations ---------------------------------------------------------------------------------------------------

function save(conversation) {
  if (conversations.includes(conversation) && !keep(conversation)) leave(conversation);
  showList();
}

function open(conversation) {
  if (running) stop();
  current = conversation;
  document.body.classList.remove("side");
  note("");
  showList();
  showConversation();
  at("input").focus();
}

function remove(conversation, next) {
  forget(conversation.id);
  leave(conversation, next);
}

// It was deleted, here or in another tab.
function leave(conversation, next = null) {
  conversations = conversations.filter((one) => one !== conversation);
  if (conversation === current) open(next ?? conversations[0] ?? newConversation());
  else showList();
}

// Another tab has changed a conversation, or deleted it (null). What is being written here is newer, and stored at its end.
function changed(id, there) {
  const mine = conversations.find((one) => one.id === id);
  if (!there) {
    if (mine) leave(mine);
    return;
  }
  if (mine && (mine.at >= there.at || (mine === current && running))) return;
  conversations = [...conversations.filter((one) => one !== mine), there];
  if (mine && mine === current) {
    current = there;
    showConversation();
  }
  showList();
}

// ---- asking ----------------------------------------------------------------------------------------------------------

async function send(text) {
  if (!conversations.includes(current)) conversations.push(current);
  if (!current.messages.length) current.title = text.trim().slice(0, TITLE);
  const message = { role: "user", content: text };
  current.messages.push(message);
  show(message, again);
  await write();
}

// The last answer once more, which stays until a word of the new one comes; or a question without one, as the last.
async function again(message) {
  if (running) return;
  const { messages } = current;
  if (message.role === "assistant") {
    drop(message);
    await write(message);
    return;
  }
  messages.push(...messages.splice(messages.indexOf(message), 1));
  showConversation();
  await write();
}

// The next answer of the current conversation, from the first request to the last word. instead: the answer it replaces.
async function write(instead = null) {
  const conversation = current, { messages } = conversation;
  const question = messages.findLast((one) => one.role === "user");
  const message = { role: "assistant", content: "" };
  const mine = running = new AbortController();
  delete question.note;
  note("");
  save(conversation);
  if (conversation !== current) return putBack(question.content);       // another tab had deleted it
  const parts = show(message, again);
  busy(parts, true);
  showRunning();
  toEnd();
  const began = performance.now();
  let first = 0, failed = null;
  try {
    for await (const news of answer(turns(messages.filter((one) => one !== instead), settings.system), mine.signal)) {
      const follow = atEnd();
      if (!first && (news.text || news.reasoning)) {
        first = performance.now();
        if (instead) messages.pop();
        messages.push(message);
      }
      hear(news, message, parts);
      if (news.usage && first) {
        conversation.numbers = measured(news.usage, began, first);
        if (conversation === current) showNumbers();
      }
      if (follow && conversation === current) toEnd();
    }
  } catch (error) {
    if (!mine.signal.aborted) failed = error;
  }
  if (running === mine) running = null;
  busy(parts, false);
  if (failed) refuse(failed);
  if (first) {
    if (failed) message.note = failed.message;
  } else {
    drop(message);
    const why = mine.signal.aborted ? "Stopped before the first word." : failed?.message ?? "The answer was empty.";
    unanswered(conversation, question, instead, why, failed);
  }
  save(conversation);
  showRunning();
  look();
}

// News of an answer, into its message and what shows it.
function hear(news, message, parts) {
  if (news.reasoning) {
    message.reasoning = (message.reasoning ?? "") + news.reasoning;
    parts.thinking.hidden = false;
    parts.thinking.open = !message.content;
    parts.thoughts.textContent = message.reasoning;
  }
  if (news.text) {
    if (!message.content) parts.thinking.open = false;
    message.content += news.text;
    parts.writer.push(news.text);
  }
  if (news.finish === "length") message.note = "The answer was cut: it may not have more tokens.";
  if (news.finish === "abort") message.note = "The server ended this answer.";
}

// No word came. An answer that was to be replaced stays. A question that cannot be answered goes back to the input, because
// every later one would fail with it; another waits for its Again.
function unanswered(conversation, question, instead, why, failed) {
  if (instead) {
    if (conversation === current) showConversation();
    if (failed) note(why);
  } else if (failed?.isRefusal) {
    conversation.messages.splice(conversation.messages.indexOf(question), 1);
    drop(question);
    putBack(question.content);
    if (!conversation.messages.length) {
      remove(conversation, newConversation());
      note(why);
    } else {
      note(failed.code === "context_length_exceeded" ? `${why}. Or begin a new chat: this one may be too long.` : why);
    }
  } else {
    question.note = why;
  }
}

function putBack(text) {
  at("input").value = [text, at("input").value].filter(Boolean).join("\n");
  grow();
  toEnd();
}

function stop() {
  running?.abort();
  running = null;
  showRunning();
}

// ---- wiring ----------------------------------------------------------------------------------------------------------

function grow() {
  const input = at("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("input").value;
  if (running || !text.trim()) return;
  at("input").value = "";
  grow();
  send(text);
});
at("input").addEventListener("input", grow);
at("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && matchMedia("(pointer: fine)").matches) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !at("settings").open) stop();
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", () => open(newConversation()));
at("clear").addEventListener("click", () => {
  if (!confirm("Delete all conversations of this browser?")) return;
  forgetAll();
  conversations = [];
  open(newConversation());
});
at("open-side").addEventListener("click", () => document.body.classList.add("side"));
at("close-side").addEventListener("click", () => document.body.classList.remove("side"));
addEventListener("pagehide", () => {                     // only what is being written: all else is stored
  if (running) save(current);
});
addEventListener("pageshow", ({ persisted }) => {        // back from the browser's cache, where no news of other tabs come
  if (persisted) location.reload();
});

listen(changed, () => {
  reloadSettings();
  watchAnew();
});
startSettings(watchAnew);
startWatch({
  found(served) {
    at("model").textContent = served.id;
    document.title = `${served.id} – Rillet`;
    note("");
    showNumbers();
  },
  said(text) {
    at("model").textContent = "…";
    note(text);
  },
  glanced(seen, text) {
    const share = seen && `${(100 * seen.cache).toFixed(seen.cache < 0.1 ? 1 : 0)} %`;
    const long = make("span", "long", seen ? ` · cache ${share}` : "");
    at("glance").replaceChildren(seen ? `${seen.running} running, ${seen.waiting} waiting` : text, long);
  },
});
showList();
showConversation();
