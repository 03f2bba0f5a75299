// The similarity matrix of the loss page: move the scale and the batch size, add a false negative,
// mask it, and see what InfoNCE pulls and pushes. tests/test_interactive.py compares the numbers
// with the library's.
"use strict";

(() => {
  // InfoNCE for the cosines of a batch, B rows of N numbers; the own positive of row i stands in
  // column i. same[i][n] = true says that column n is no negative of row i. The gradient is that
  // of the loss with respect to each cosine.
  function infoNce(cosines, scale, same = []) {
    const B = cosines.length;
    const rows = cosines.map((row, i) => {
      const isMasked = (n) => n !== i && Boolean(same[i] && same[i][n]);
      const scores = row.map((cosine, n) => (isMasked(n) ? -Infinity : scale * cosine));
      const top = Math.max(...scores); // without it, exp would overflow at large scales
      const exps = scores.map((score) => Math.exp(score - top));
      const total = exps.reduce((sum, x) => sum + x, 0);
      const chances = exps.map((x) => x / total);
      return { chances, loss: top + Math.log(total) - scores[i] };
    });
    return {
      loss: rows.reduce((sum, row) => sum + row.loss, 0) / B,
      losses: rows.map((row) => row.loss),
      gradient: rows.map(({ chances }, i) =>
        chances.map((chance, n) => (scale / B) * (chance - (n === i ? 1 : 0))),
      ),
    };
  }

  // The rows and columns of a batch: the first `size` pairs, and the repeated one if it is asked
  // for. It is the last of all, and has the answer of row 0.
  function batch(cosines, { size, repeat, mask }) {
    const last = cosines.length - 1;
    const chosen = [...Array(size).keys(), ...(repeat ? [last] : [])];
    const isSame = (i, n) => mask && repeat && [0, last].includes(i) && [0, last].includes(n);
    return {
      chosen,
      cosines: chosen.map((i) => chosen.map((n) => cosines[i][n])),
      same: chosen.map((i) => chosen.map((n) => i !== n && isSame(i, n))),
    };
  }

  if (typeof module !== "undefined") module.exports = { infoNce, batch };
  if (typeof document === "undefined") return; // in node there is nothing to draw

  const { make, slider, checkbox, choice, figure } = window.Touch;

  // Two digits behind the point and a true minus; what rounds to nothing has no sign.
  function number(x) {
    const text = x.toFixed(Math.abs(x) < 9.995 ? 2 : 1);
    return text === "-0.00" ? "0.00" : text.replace("-", "−");
  }

  // A cell whose colour is as strong as `share`, from -1 to 1.
  function cell(text, share, title) {
    const strength = Math.round(60 * Math.min(1, Math.abs(share)));
    const colour = share < 0 ? "minus" : "plus";
    const style = `--strength: ${strength}%; --colour: var(--touch-${colour})`;
    return make("td", { class: "touch-cell", style, title }, text);
  }

  function table(caption, { chosen, same }, texts, show, losses) {
    const head = make("tr", {}, make("td"));
    for (const n of chosen) head.append(make("th", { scope: "col", title: texts[n][1] }, `${n}`));
    if (losses) head.append(make("th", { scope: "col" }, "loss"));
    const body = chosen.map((i, row) => {
      const line = make("tr", {}, make("th", { scope: "row", title: texts[i][0] }, `${i}`));
      chosen.forEach((n, column) => {
        const title = `${texts[i][0]} – ${texts[n][1]}`;
        const masked = make("td", { class: "touch-masked", "aria-label": "masked", title }, "·");
        line.append(same[row][column] ? masked : show(row, column, title));
      });
      if (losses) line.append(make("td", { class: "touch-loss" }, number(losses[row])));
      return line;
    });
    return make("table", {}, make("caption", {}, caption), head, ...body);
  }

  figure("similarity-matrix", (place, { encoders, texts }) => {
    const names = Object.keys(encoders);
    const most = texts.length - 1;
    const state = { encoder: names[0], scale: 20, size: most, repeat: true, mask: false };
    const result = make("p", { class: "touch-result", role: "status" });
    const tables = make("div", { class: "touch-tables" });

    function draw() {
      const rows = batch(encoders[state.encoder], state);
      const { loss, losses, gradient } = infoNce(rows.cosines, state.scale, rows.same);
      const N = rows.chosen.length;
      const guess = `Guessing among ${N} would cost log ${N} = ${Math.log(N).toFixed(4)}.`;
      result.textContent = `Loss ${loss.toFixed(4)}. ${guess}`;
      result.dataset.loss = loss;
      const strongest = state.scale / N; // no cell is pulled or pushed more than this
      tables.replaceChildren(
        table("cosine", rows, texts, (row, column, title) => {
          const cosine = rows.cosines[row][column];
          return cell(number(cosine), cosine, title);
        }),
        table(
          "gradient: − pulls closer, + pushes away",
          rows,
          texts,
          (row, column, title) => {
            const slope = gradient[row][column];
            return cell(number(slope), -slope / strongest, title);
          },
          losses,
        ),
      );
    }

    const change = (key) => (value) => {
      state[key] = value;
      mask.querySelector("input").disabled = !state.repeat;
      draw();
    };
    const mask = checkbox("mask equal texts", state.mask, change("mask"));
    const controls = make(
      "div",
      { class: "touch-controls" },
      slider("scale", { min: 1, max: 100, value: state.scale }, change("scale")),
      checkbox(`row ${most} repeats the answer of row 0`, state.repeat, change("repeat")),
      mask,
    );
    // a control with nothing to choose from is left out
    const size = { min: 2, max: most, value: most };
    if (most > 2) controls.children[0].after(slider("pairs in the batch", size, change("size")));
    if (names.length > 1) controls.prepend(choice("encoder", names, names[0], change("encoder")));
    place.append(controls, result, tables);
    draw();
  });
})();
