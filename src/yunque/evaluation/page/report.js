"use strict";
(() => {
  const PAGE = 25;
  const data = JSON.parse(document.getElementById("answers-data").textContent);
  const at = (name) => document.getElementById(name);
  const controls = { q: at("q"), set: at("set"), model: at("model"), metric: at("metric"), sort: at("sort"), changed: at("changed") };
  let shown = PAGE;

  const set = () => data[Number(controls.set.value) || 0];
  const option = (value, text) => {
    const element = document.createElement("option");
    element.value = value;
    element.textContent = text;
    return element;
  };
  const fill = (select, entries, keep) => {
    select.replaceChildren(...entries.map(([value, text]) => option(value, text)));
    if (entries.some(([value]) => value === keep)) select.value = keep;
    select.parentElement.hidden = entries.length < 2;
  };
  const element = (kind, className, ...children) => {
    const node = document.createElement(kind);
    if (className) node.className = className;
    node.append(...children);
    return node;
  };

  // What both texts hold, as the longest common run of words: the words of `text` that are not in it are marked.
  const marked = (text, other) => {
    const words = text.split(/(\s+)/), others = other.split(/(\s+)/);
    const node = element("p");
    if (!other || words.length * others.length > 250000) {
      node.textContent = text;
      return node;
    }
    const wide = others.length + 1, best = new Uint16Array((words.length + 1) * wide);
    for (let i = words.length - 1; i >= 0; i--)
      for (let j = others.length - 1; j >= 0; j--)
        best[i * wide + j] = words[i] === others[j] ? best[(i + 1) * wide + j + 1] + 1
          : Math.max(best[(i + 1) * wide + j], best[i * wide + j + 1]);
    let i = 0, j = 0, plain = "", fresh = "";
    const flush = () => {
      if (plain) node.append(plain);
      if (fresh.trim()) node.append(element("mark", "", fresh));
      else if (fresh) node.append(fresh);
      plain = fresh = "";
    };
    while (i < words.length) {
      if (j < others.length && words[i] === others[j]) {
        if (fresh) flush();
        plain += words[i]; i++; j++;
      } else if (j < others.length && best[i * wide + j + 1] >= best[(i + 1) * wide + j]) j++;
      else {
        if (plain) flush();
        fresh += words[i]; i++;
      }
    }
    flush();
    return node;
  };

  const number = (value, metric, sign) => value === null ? "–"
    : (sign && value > 0 ? "+" : "") + value.toFixed(metric.digits).replace(/^-(0(\.0*)?)$/, "$1").replace("-", "−");

  const textOf = (label, node, className) => {
    const box = element("div", className || "", element("h4", "", label), node);
    return box;
  };

  const card = (row, current, model, metric) => {
    const before = row.scores[metric.name][0], after = row.scores[metric.name][model];
    const gap = before === null || after === null ? null : after - before;
    const heading = element("h3", "", `Prompt ${row.id}`,
      element("span", "", `${metric.label}: ${number(before, metric)} → ${number(after, metric)} (${number(gap, metric, true)})`));
    const prompt = element("p", "", row.prompt);
    prompt.tabIndex = 0;
    const empty = () => element("p", "soft", "(empty)");
    const boxes = [textOf("Prompt", prompt, "prompt")];
    if (row.references.length) boxes.push(textOf("Reference", element("p", "", row.references.join("\n"))));
    boxes.push(textOf(current.models[0], row.answers[0] ? element("p", "", row.answers[0]) : empty()));
    const answer = row.answers[model];
    boxes.push(textOf(current.models[model], answer ? marked(answer, row.answers[0]) : empty()));
    return element("article", "answer", heading, element("div", "texts", ...boxes));
  };

  const draw = () => {
    const current = set(), model = Number(controls.model.value);
    const metric = current.metrics.find((each) => each.name === controls.metric.value);
    const words = controls.q.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = current.rows.filter((row) => {
      if (controls.changed.checked && row.answers[0] === row.answers[model]) return false;
      const text = [row.id, row.prompt, ...row.references, row.answers[0], row.answers[model]].join("\n").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const value = (row, index) => row.scores[metric.name][index];
    const gap = (row) => value(row, 0) === null || value(row, model) === null ? null : value(row, model) - value(row, 0);
    const keys = {
      change: (row) => gap(row) === null ? null : Math.abs(gap(row)),
      up: gap,
      down: (row) => gap(row) === null ? null : -gap(row),
      first: (row) => value(row, 0),
      second: (row) => value(row, model),
    };
    const key = keys[controls.sort.value];
    if (key) {
      const last = (worth) => worth === null ? -Infinity : worth;
      found.sort((a, b) => last(key(b)) - last(key(a)) || 0);
    }
    at("cards").replaceChildren(...found.slice(0, shown).map((row) => card(row, current, model, metric)));
    at("count").textContent = `${found.length} of ${current.rows.length} prompts` + (found.length > shown ? `, ${shown} shown` : "");
    at("more").hidden = found.length <= shown;
  };

  const choices = () => {
    const current = set();
    fill(controls.model, current.models.slice(1).map((name, index) => [String(index + 1), name]), controls.model.value);
    fill(controls.metric, current.metrics.map((each) => [each.name, each.label]), controls.metric.value || current.rank_by);
    controls.metric.parentElement.hidden = false;
  };
  const remember = () => {
    const state = new URLSearchParams();
    for (const [name, control] of Object.entries(controls))
      state.set(name, control.type === "checkbox" ? Number(control.checked) : control.value);
    history.replaceState(null, "", `#${state}`);
  };
  const restore = () => {
    const state = new URLSearchParams(location.hash.slice(1));
    if (state.has("set")) controls.set.value = state.get("set");
    choices();
    for (const [name, control] of Object.entries(controls)) {
      if (!state.has(name)) continue;
      if (control.type === "checkbox") control.checked = state.get(name) === "1";
      else if (control.tagName !== "SELECT" || [...control.options].some((each) => each.value === state.get(name)))
        control.value = state.get(name);
    }
  };

  fill(controls.set, data.map((each, index) => [String(index), each.name]), "0");
  restore();
  draw();
  for (const control of Object.values(controls))
    control.addEventListener(control.type === "search" ? "input" : "change", () => {
      shown = PAGE;
      if (control === controls.set) choices();
      draw();
      remember();
    });
  at("more").addEventListener("click", () => { shown += PAGE; draw(); });
  at("answers-tools").hidden = false;
})();
