// Figures that readers can move: where they stand on a page, and the controls they share.
//
// These are plain scripts and no ES modules, because a browser refuses to load a module into a
// page that was opened as a file, and this site may be read that way. Each script wraps itself in
// a function, so that none sees the other's names.
"use strict";

window.Touch = (() => {
  let ids = 0;

  // An element with attributes and children: make("p", {class: "note"}, "text", other).
  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  // A slider with its name and value; `change` gets the number whenever it is moved.
  function slider(name, { min, max, value }, change) {
    const id = `touch-${ids++}`;
    const shown = make("output", { for: id }, String(value));
    const input = make("input", { type: "range", id, min, max, value, step: 1 });
    input.addEventListener("input", () => {
      shown.textContent = input.value;
      change(Number(input.value));
    });
    return make("div", { class: "touch-control" }, make("label", { for: id }, name), input, shown);
  }

  // A box to tick; `change` gets true or false.
  function checkbox(name, checked, change) {
    const id = `touch-${ids++}`;
    const input = make("input", { type: "checkbox", id });
    input.checked = checked;
    input.addEventListener("change", () => change(input.checked));
    return make("div", { class: "touch-control" }, input, make("label", { for: id }, name));
  }

  // A list to choose from; `change` gets the word that was chosen.
  function choice(name, words, chosen, change) {
    const id = `touch-${ids++}`;
    const select = make("select", { id });
    for (const word of words) select.append(make("option", { value: word }, word));
    select.value = chosen;
    select.addEventListener("change", () => change(select.value));
    return make("div", { class: "touch-control" }, make("label", { for: id }, name), select);
  }

  // Fill each place of a page that names this figure: draw(place, numbers) does it. Until then
  // the place holds a sentence, which is all that a page without scripts shows.
  function figure(name, draw) {
    const fill = () => {
      for (const place of document.querySelectorAll(`[data-touch="${name}"]`)) {
        const task = place.getAttribute("aria-label");
        const sentence = `${task[0].toUpperCase()}${task.slice(1)}.`;
        place.replaceChildren(make("p", { class: "touch-task" }, sentence));
        draw(place, JSON.parse(place.dataset.numbers));
        // the plot of the same cell stays for print only
        place.closest(".cell_output")?.classList.add("touched");
      }
    };
    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", fill);
    else fill();
  }

  return { make, slider, checkbox, choice, figure };
})();
