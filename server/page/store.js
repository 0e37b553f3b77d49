// Conversations and settings, in this browser only. Each conversation has an entry of its own, so two tabs do not write over
// each other's; of two versions of one the newest holds, and what was deleted stays deleted. When the browser has no room
// left, the oldest conversation goes.

import { tidy } from "./turns.js";

const ONE = "rillet.conversation.";          // and its id
const OLD = "rillet.conversations";          // once they were all in one entry
const SETTINGS = "rillet.settings";
const MOST = 200;

const known = new Set();                     // ids that have an entry: one without it was deleted in another tab
const gone = new Set();                      // ids that were deleted here: a late word of another tab does not bring them back

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;                            // full, or private mode: it lasts as long as the page
  }
}

function erase(name) {
  try {
    localStorage.removeItem(name);
  } catch { /* no storage at all */ }
}

// ---- settings --------------------------------------------------------------------------------------------------------

const text = (value) => (typeof value === "string" ? value : "");
const between = (value, least, most) => (typeof value === "number" && value >= least && value <= most ? value : null);

export function loadSettings() {
  const given = read(SETTINGS) ?? {};
  return {
    system: text(given.system), temperature: between(given.temperature, 0, 2), key: text(given.key), theme: text(given.theme),
    maxTokens: Number.isInteger(given.maxTokens) ? between(given.maxTokens, 1, Infinity) : null,
  };
}

export function saveSettings(settings) {
  write(SETTINGS, settings);
}

// ---- conversations ---------------------------------------------------------------------------------------------------

export function newConversation() {
  return { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: "New chat", at: Date.now(), messages: [] };
}

// A conversation as it may be used, or null: what is stored may be another version's, or no one's.
function checked(found) {
  if (typeof found?.id !== "string" || !Array.isArray(found.messages)) return null;
  const messages = tidy(found.messages);
  return messages.length ? { ...found, title: text(found.title) || "Chat", at: Number(found.at) || 0, messages } : null;
}

function names() {
  try {
    return Object.keys(localStorage).filter((name) => name.startsWith(ONE));
  } catch {
    return [];
  }
}

// The newest first.
function stored() {
  return names().map((name) => checked(read(name))).filter(Boolean).sort((one, other) => other.at - one.at);
}

function makeRoom(evicted) {
  for (const { id } of evicted) {
    known.delete(id);                        // not deleted: as long as the page is there it may be stored again
    erase(ONE + id);
  }
}

function takeOld() {
  const old = read(OLD);
  for (const one of Array.isArray(old) ? old.map(checked).filter(Boolean) : []) {
    if (!((read(ONE + one.id)?.at ?? 0) > one.at)) write(ONE + one.id, one);
  }
  erase(OLD);
}

/** [{id, title, at, messages: [{role, content, reasoning?, note?}]}] */
export function loadConversations() {
  takeOld();
  const found = stored();
  for (const { id } of found) known.add(id);
  return found;
}

/** Stores one conversation as the newest version of it. False where it was deleted, here or in another tab. */
export function keep(conversation) {
  const { id } = conversation;
  const name = ONE + id;
  if (gone.has(id) || (known.has(id) && read(name) === null)) return false;
  conversation.at = Date.now();
  while (!write(name, conversation)) {
    const oldest = stored().filter((one) => one.id !== id).slice(-1);
    if (!oldest.length) return true;
    makeRoom(oldest);
  }
  if (names().length > MOST) makeRoom(stored().slice(MOST));
  known.add(id);
  return true;
}

export function forget(id) {
  gone.add(id);
  erase(ONE + id);
}

/** Every conversation, those of other tabs too. */
export function forgetAll() {
  for (const id of [...known, ...stored().map((one) => one.id)]) forget(id);
}

/** Tells what other tabs do: changed(id, conversation, null where it was deleted) and settled(), for the settings. */
export function listen(changed, settled) {
  addEventListener("storage", ({ key, storageArea }) => {
    if (storageArea !== localStorage) return;
    if (key === null) for (const id of known) changed(id, null);
    if (key === null || key === SETTINGS) settled();
    if (!key?.startsWith(ONE)) return;
    const id = key.slice(ONE.length);
    const there = checked(read(key));
    if (there && gone.has(id)) erase(key);
    else changed(id, there);
    if (there) known.add(id);
  });
}
