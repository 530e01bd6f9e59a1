"use strict";
(() => {
  const KEY = "yunque-key";
  const FIELDS = ["model", "other", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop_at", "key"];
  const at = (name) => document.getElementById(name);
  const field = Object.fromEntries(FIELDS.map((name) => [name, at(name)]));
  const state = { models: [], judge: null, running: null };

  const element = (kind, className, ...children) => {
    const node = document.createElement(kind);
    if (className) node.className = className;
    node.append(...children);
    return node;
  };
  const say = (text) => { at("status").textContent = text; };
  const complain = (text) => {
    at("error").textContent = text;
    at("error").hidden = !text;
  };

  // ---- models ----
  const KINDS = { seq2seq: "encoder-decoder: answers the prompt", causal: "decoder-only: goes on with the prompt" };
  const fill = (select, entries, keep) => {
    select.replaceChildren(...entries.map(([value, text]) => {
      const option = element("option", "", text);
      option.value = value;
      return option;
    }));
    if (entries.some(([value]) => value === keep)) select.value = keep;
  };
  const loadModels = async () => {
    try {
      const found = await server.models(field.key.value);
      state.models = found.filter((model) => model.kind !== "classifier");
      state.judge = found.find((model) => model.kind === "classifier") || null;
      complain(state.models.length ? "" : "This server holds no model that writes text.");
    } catch (error) {
      state.models = [];
      complain(error.message);
      if (/API key/.test(error.message)) at("access").open = true;
    }
    const names = state.models.map((model) => [model.id, model.id]);
    fill(field.model, names, field.model.value);
    fill(field.other, [["", "no other"], ...names], field.other.value);
    at("other-box").hidden = names.length < 2;
    at("run").disabled = !names.length;
    about();
  };
  const about = () => {
    const model = state.models.find((each) => each.id === field.model.value);
    const judged = state.judge ? `answers are scored by ${state.judge.id}` : "";
    const folder = model?.manifest_sha256 ? `manifest ${model.manifest_sha256.slice(0, 12)}` : "";
    at("about").textContent = [model && KINDS[model.kind], folder, judged].filter(Boolean).join(" · ");
  };

  // ---- one answer ----
  const column = (name) => {
    const facts = new Map(), list = element("dl");
    const text = element("div", "text"), problem = element("p", "problem");
    problem.hidden = true;
    const box = element("article", "answer", element("h3", "", name), text, problem, list);
    const show = (label, value, className) => {
      if (!facts.has(label)) {
        facts.set(label, element("dd"));
        list.append(element("dt", "", label), facts.get(label));
      }
      facts.get(label).replaceChildren(className ? element("span", className, value) : value);
    };
    return { name, box, text, show, fail: (words) => { problem.textContent = words; problem.hidden = false; } };
  };

  const REASONS = { stop: "the model ended it", length: "most tokens reached", stopped: "stopped here",
    deadline: "the server's time was over", cancelled: "cancelled", content_filter: "held back by the server's guard" };

  const answer = async (target, request, signal) => {
    const begin = performance.now();
    let first = null, last = null, pieces = 0, reason = "stopped", tokens = null;
    target.box.setAttribute("aria-busy", "true");
    try {
      const end = await server.complete({ ...request, model: target.name }, field.key.value, signal, (piece) => {
        last = performance.now();
        first ??= last;
        pieces++;
        target.text.append(piece);
      });
      reason = end.reason;
      tokens = end.usage?.completion_tokens ?? null;
    } catch (error) {
      reason = error.name === "AbortError" ? "stopped" : "failed";
      if (reason === "failed") target.fail(error.message);
    }
    target.box.setAttribute("aria-busy", "false");
    target.reason = reason;
    target.answer = target.text.textContent;
    if (reason !== "failed" && !target.answer) target.text.append(element("span", "soft", "(empty)"));
    if (first !== null) target.show("First token", `${Math.round(first - begin)} ms`);
    const count = tokens ?? pieces;
    if (count) target.show(tokens === null ? "Pieces of text" : "Tokens", String(count));
    if (count > 1 && last > first) target.show("Tokens a second", ((count - 1) / (last - first) * 1000).toFixed(1));
    if (reason !== "failed") target.show("End", REASONS[reason] || reason || "unknown");
  };

  const judge = async (targets) => {
    const judged = targets.filter((target) => target.answer && target.reason !== "failed");
    if (!state.judge || !judged.length) return;
    try {
      const scores = await server.toxicity(state.judge.id, judged.map((target) => target.answer), field.key.value);
      judged.forEach((target, row) => {
        const { label, probability, flagged } = scores[row];
        target.show("Toxicity", `${(100 * probability).toFixed(1)} %, ${label}`, flagged ? "flagged" : "");
      });
    } catch (error) {
      for (const target of judged) target.show("Toxicity", error.message);
    }
  };

  const markDifferences = (targets) => {
    const [left, right] = targets;
    if (!right || !left.answer || !right.answer) return;
    const compared = words.compare(left.answer, right.answer);
    if (compared)
      targets.forEach((target, side) => target.text.replaceChildren(
        ...compared.runs[side].map((run) => run.same ? run.text : element("mark", "", run.text))));
    at("compared").textContent = !compared ? "The answers are too long to mark their differences."
      : left.answer === right.answer ? "Both answers are the same."
        : `${Math.floor(100 * compared.share)} % of the words are the same; marked words are in one answer only. `
          + "Both ran at the same time, so their speeds share this machine.";
    at("compared").hidden = false;
  };

  // ---- the form ----
  const number = (name) => field[name].value === "" ? undefined : Number(field[name].value);
  const request = () => {
    const stop = field.stop_at.value.split("\n").filter(Boolean);
    const asked = { prompt: field.prompt.value, max_tokens: number("max_tokens"), temperature: number("temperature"), top_p: number("top_p"),
      seed: number("seed") };
    if (stop.length) asked.stop = stop;
    return asked;
  };
  const wrong = () => {
    const bad = FIELDS.map((name) => field[name]).find((each) => !each.checkValidity());
    if (bad) {
      bad.closest("details")?.setAttribute("open", "");
      bad.focus();
      return `${bad.labels[0].firstChild.textContent.trim()}: ${bad.validationMessage}`;
    }
    if (!field.prompt.value.trim()) {
      field.prompt.focus();
      return "Write a prompt first.";
    }
    if (field.stop_at.value.split("\n").filter(Boolean).length > 4) return "Stop at: give at most four texts.";
    return "";
  };

  const run = async () => {
    if (state.running || at("run").disabled) return;
    const problem = wrong();
    complain(problem);
    if (problem) return;
    const names = [field.model.value, field.other.value].filter(Boolean);
    const targets = names.map(column);
    at("columns").replaceChildren(...targets.map((target) => target.box));
    at("none").hidden = true;
    at("compared").hidden = true;
    state.running = new AbortController();
    at("run").disabled = true;
    at("stop").disabled = false;
    say("Answering…");
    const asked = request();
    await Promise.all(targets.map((target) => answer(target, asked, state.running.signal)));
    const stopped = state.running.signal.aborted;
    state.running = null;
    at("stop").disabled = true;
    at("run").disabled = false;
    const failed = targets.filter((target) => target.reason === "failed");
    say(stopped ? "Stopped." : failed.length ? `No whole answer of ${failed.map((target) => target.name).join(" and ")}.` : "Answered.");
    markDifferences(targets);
    await judge(targets);
  };
  const stop = () => {
    state.running?.abort();
    if (document.activeElement === at("stop")) at("prompt").focus();
  };

  at("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  at("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.running) stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
  });
  field.model.addEventListener("change", about);
  field.key.addEventListener("change", () => {
    sessionStorage.setItem(KEY, field.key.value);
    loadModels();
  });
  field.key.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); field.key.dispatchEvent(new Event("change")); }
  });

  field.key.value = sessionStorage.getItem(KEY) || "";
  at("form").hidden = false;
  loadModels();
})();
