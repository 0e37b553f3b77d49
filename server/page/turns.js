// Which messages of a conversation a model gets to see. A question without an answer stays in the conversation, and may be
// asked again, but is not sent along with the next one: templates want the two sides to take turns.

const said = (message) => message?.role === "assistant" && message.content.trim() !== "";

/** Whether nothing at all follows the question at `index`, no thoughts either. */
export function isUnanswered(messages, index) {
  return messages[index].role === "user" && messages[index + 1]?.role !== "assistant";
}

/** What is sent: the system prompt, each question with its answer, and the last message, which must be a question. */
export function turns(messages, system) {
  const made = system.trim() ? [{ role: "system", content: system }] : [];
  const add = ({ role, content }) => made.push({ role, content });
  messages.forEach((message, index) => {
    const answer = messages[index + 1];
    if (message.role !== "user" || (answer && !said(answer))) return;
    add(message);
    if (answer) add(answer);
  });
  return made;
}

/** Stored messages without those that are none and answers without a word, whose note goes to their question. */
export function tidy(messages) {
  const kept = [];
  for (const message of messages) {
    if (!["user", "assistant"].includes(message?.role) || typeof message.content !== "string") continue;
    if (message.role === "user" || message.content.trim() || message.reasoning) kept.push(message);
    else if (message.note && kept.at(-1)?.role === "user") kept.at(-1).note = message.note;
  }
  return kept;
}
