"use strict";
// Which words two answers share: the longest common run of words, so that the rest of each can be marked.
const words = (() => {
  const MOST_CELLS = 4_000_000; // of the table: two answers of 1,000 words and their spaces
  const split = (text) => text.split(/(\s+)/).filter(Boolean);

  // For each word whether the other text has it too, in the same order; null when the texts are too long to compare.
  const common = (left, right) => {
    const wide = right.length + 1;
    if ((left.length + 1) * wide > MOST_CELLS) return null;
    const best = new Uint16Array((left.length + 1) * wide);
    for (let i = left.length - 1; i >= 0; i--)
      for (let j = right.length - 1; j >= 0; j--)
        best[i * wide + j] = left[i] === right[j] ? best[(i + 1) * wide + j + 1] + 1
          : Math.max(best[(i + 1) * wide + j], best[i * wide + j + 1]);
    const shared = [new Array(left.length).fill(false), new Array(right.length).fill(false)];
    for (let i = 0, j = 0; i < left.length && j < right.length;) {
      if (left[i] === right[j]) { shared[0][i++] = true; shared[1][j++] = true; }
      else if (best[i * wide + j + 1] >= best[(i + 1) * wide + j]) j++;
      else i++;
    }
    return shared;
  };

  // Spaces between two words of the same kind belong to them, so that marks run over whole phrases.
  const runs = (parts, shared) => {
    const found = [];
    const add = (text, same) => {
      const last = found.at(-1);
      if (last && last.same === same) last.text += text;
      else found.push({ text, same });
    };
    parts.forEach((part, at) => {
      const inside = at > 0 && at + 1 < parts.length && !shared[at - 1] && !shared[at + 1];
      add(part, /^\s+$/.test(part) ? !inside : shared[at]);
    });
    return found;
  };

  const compare = (left, right) => {
    const parts = [split(left), split(right)];
    const shared = common(...parts);
    if (!shared) return null;
    const isWord = (part) => /\S/.test(part);
    const count = parts.map((each) => each.filter(isWord).length);
    const same = parts[0].filter((part, at) => isWord(part) && shared[0][at]).length;
    return {
      runs: parts.map((each, side) => runs(each, shared[side])),
      share: count[0] + count[1] ? 2 * same / (count[0] + count[1]) : 1,
    };
  };
  return { compare };
})();
