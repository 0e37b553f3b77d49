// The numbers of an answer: how fast it came, and what it leaves of the context.

/** usage: the server's; began, first: performance.now() when it was asked for and when its first word came. */
export function measured(usage, began, first) {
  const seconds = (performance.now() - first) / 1000;
  const tokens = usage.completion_tokens - 1;
  return { rate: tokens > 0 && seconds > 0 ? tokens / seconds : 0, first: (first - began) / 1000, used: usage.total_tokens };
}

export function inWords(numbers, served) {
  const words = [];
  if (numbers?.rate) words.push(`${numbers.rate.toFixed(1)} tokens/s`);
  if (numbers?.first) words.push(`first word after ${numbers.first.toFixed(2)} s`);
  if (numbers?.used && served) words.push(`${Math.max(0, served.max_model_len - numbers.used).toLocaleString("en")} tokens left`);
  return words.join(" · ");
}
