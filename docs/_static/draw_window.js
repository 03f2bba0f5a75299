// The draw window of the mixture page: move the weights and the place in the epoch, and see which
// dataset fills which step. tests/test_interactive.py compares the tables with the library's.
"use strict";

(() => {
  // Draws of each choice among the first n, for weights that are whole numbers: the heaviest takes
  // its share, to the nearest draw, and the others split the rest by the same rule.
  function drawCounts(weights, n) {
    const counts = weights.map(() => 0);
    let rest = weights.reduce((sum, w) => sum + w, 0);
    const heaviestFirst = weights.map((_, i) => i).sort((i, j) => weights[j] - weights[i]);
    for (const i of heaviestFirst) {
      const left = Math.floor((2 * n * (rest - weights[i]) + rest) / (2 * rest));
      counts[i] = n - left;
      n = left;
      rest -= weights[i];
    }
    return counts;
  }

  // The draws of a window: for each step its k choices, which turn of the choice each is, and the
  // steps before they were shuffled. `order` holds the two permutations that the library made for
  // this window, of the choices and of the steps; they do not depend on the weights.
  function drawWindow(weights, k, window, order) {
    const steps = order.steps.length;
    const start = drawCounts(weights, window * steps * k);
    const stop = drawCounts(weights, (window + 1) * steps * k);
    // the draws of each choice in one run, which is cut into k columns
    const run = order.choices.flatMap((i) => Array(stop[i] - start[i]).fill(i));
    const grouped = order.steps.map((_, s) =>
      Array.from({ length: k }, (_, column) => run[column * steps + s]),
    );
    const choice = order.steps.map((s) => grouped[s]);
    const next = [...start];
    const turn = choice.map((row) => row.map((i) => next[i]++));
    return { choice, turn, grouped, start, stop };
  }

  if (typeof module !== "undefined") module.exports = { drawCounts, drawWindow };
  if (typeof document === "undefined") return; // in node there is nothing to draw

  const { make, slider, checkbox, figure } = window.Touch;

  // One dataset's line: its share, its draws in this window, and how often it meets itself.
  function line(name, i, weights, k, { choice, start, stop }) {
    const draws = stop[i] - start[i];
    const share = weights[i] / weights.reduce((sum, w) => sum + w, 0);
    const twice = choice.filter((row) => row.filter((j) => j === i).length > 1).length;
    const numbers = [
      `${(100 * share).toFixed(1)}%`,
      `${draws} of ${choice.length * k}`,
      draws ? `${start[i]} to ${stop[i] - 1}` : "none",
      twice,
    ];
    const label = make("span", { class: `touch-draw touch-choice-${i}` }, name);
    const cells = numbers.map((text) => make("td", {}, String(text)));
    return make("tr", {}, make("th", { scope: "row" }, label), ...cells);
  }

  function summary(names, weights, k, drawn) {
    const titles = ["dataset", "share", "draws", "its turns", "twice in a step"];
    const head = titles.map((title) => make("th", { scope: "col" }, title));
    const lines = names.map((name, i) => line(name, i, weights, k, drawn));
    return make("table", {}, make("tr", {}, ...head), ...lines);
  }

  figure("draw-window", (place, { names, weights, orders }) => {
    const state = { window: 1, k: 2, weights: [...weights], shuffled: true };
    const steps = make("div", { class: "touch-steps", role: "img" });
    const table = make("div", { class: "touch-tables" });
    const result = make("p", { class: "touch-result", role: "status" });

    function draw() {
      const drawn = drawWindow(state.weights, state.k, state.window, orders[state.window]);
      const first = state.window * drawn.choice.length;
      const last = first + drawn.choice.length - 1;
      const counts = names.map((name, i) => `${name} ${drawn.stop[i] - drawn.start[i]}`);
      result.textContent = `Steps ${first} to ${last}, draws of ${counts.join(", ")}.`;
      steps.setAttribute("aria-label", `The datasets of each step. ${result.textContent}`);
      steps.replaceChildren(
        ...(state.shuffled ? drawn.choice : drawn.grouped).map((row) => {
          const cells = row.map((i) =>
            make("span", { class: `touch-draw touch-choice-${i}` }, names[i]),
          );
          return make("div", {}, ...cells);
        }),
      );
      table.replaceChildren(summary(names, state.weights, state.k, drawn));
    }

    const change = (key) => (value) => {
      state[key] = value;
      draw();
    };
    const weigh = (i) => (value) => {
      state.weights[i] = value;
      draw();
    };
    const most = orders.length - 1;
    place.append(
      make(
        "div",
        { class: "touch-controls" },
        slider("window of the run", { min: 0, max: most, value: state.window }, change("window")),
        slider("draws in a step", { min: 1, max: 4, value: state.k }, change("k")),
        ...names.map((name, i) =>
          slider(`weight of ${name}`, { min: 1, max: 9, value: weights[i] }, weigh(i)),
        ),
        checkbox("steps in random order", state.shuffled, change("shuffled")),
      ),
      result,
      steps,
      table,
    );
    draw();
  });
})();
