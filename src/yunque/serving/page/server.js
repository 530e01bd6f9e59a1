"use strict";
// The server's API as the page uses it: models, a streamed completion, toxicity; its errors in words.
const server = (() => {
  class Refusal extends Error {}

  const inWords = (status, told, retryAfter) => {
    const said = told ? ` (${told})` : "";
    if (status === 401 || status === 403) return `The server wants an API key, and this is none of its own. Enter it under “API key”.${said}`;
    if (status === 429) return `The server is busy. Try again${retryAfter ? ` in ${retryAfter} s` : " soon"}.${said}`;
    if (status === 503) return `The server takes no requests now: it is starting or stopping.${said}`;
    if (status === 413) return `The prompt is too long for this server.${said}`;
    if (status === 504 || status === 408) return `The server did not finish in its time.${said}`;
    if (status >= 500) return `The server failed. Its log names the reason.${said}`;
    return told || `The server answered ${status}.`;
  };

  const messageOf = (body) => typeof body?.error === "string" ? body.error : body?.error?.message || "";

  const ask = async (path, key, { body, signal } = {}) => {
    const headers = {};
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The server does not answer. Is it still running?");
    }
    if (answer.ok) return answer;
    const told = messageOf(await answer.json().catch(() => null));
    throw new Refusal(inWords(answer.status, told, answer.headers.get("Retry-After")));
  };

  // The data of each server-sent event, as it arrives.
  async function* events(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let left = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (left + value).split(/\r?\n\r?\n/);
      left = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  }

  // Calls onText with each new piece; resolves to {usage, reason} of an answer that came to its end.
  const complete = async (request, key, signal, onText) => {
    const body = { ...request, stream: true, stream_options: { include_usage: true } };
    const answer = await ask("v1/completions", key, { body, signal });
    let usage = null, reason = null, ended = false;
    try {
      for await (const data of events(answer.body)) {
        if (data === "[DONE]") { ended = true; break; }
        const event = JSON.parse(data);
        if (event.error) throw new Refusal(`The answer broke off: ${messageOf(event)}`);
        usage = event.usage || usage;
        const choice = event.choices?.[0];
        if (!choice) continue;
        reason = choice.finish_reason || reason;
        if (choice.text) onText(choice.text);
      }
    } catch (error) {
      if (error instanceof Refusal || error.name === "AbortError") throw error;
      throw new Refusal("The connection broke off before the answer's end.");
    }
    if (!ended && !reason) throw new Refusal("The connection ended before the answer did.");
    return { usage, reason };
  };

  const models = async (key) => (await (await ask("v1/models", key)).json()).data;

  // For each text the probability of any label but the first, as the server's own guard counts it.
  const toxicity = async (judge, texts, key) => {
    const { results } = await (await ask("classify", key, { body: { model: judge, text: texts } })).json();
    return results.map(({ label, probabilities }) => {
      const harmless = Object.keys(probabilities)[0];
      return { label, probability: 1 - probabilities[harmless], flagged: label !== harmless };
    });
  };

  return { complete, models, toxicity };
})();
