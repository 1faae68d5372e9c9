"use strict";
// Draws the plots whose data stand in the page, and makes its buttons work. Nothing is fetched.
document.documentElement.classList.remove("no-script");
const AXES = { flops: "FLOPs", tokens: "tokens", step: "updates", seconds: "seconds" };
const MASKS = JSON.parse(document.getElementById("masks").textContent);

function press(group, chosen) {
  for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === chosen));
}

function draw(holder) {
  const figure = JSON.parse(document.getElementById("data-" + holder.id).textContent);
  Plotly.newPlot(holder, figure.data, figure.layout, { responsive: true, displaylogo: false });
}

function changeAxis(plot, axis) {
  const update = { x: plot.data.map((trace) => trace.meta[axis]) };
  const layout = {};
  for (const name of Object.keys(plot.layout)) {
    if (name.startsWith("xaxis")) layout[name + ".title.text"] = AXES[axis];
  }
  Plotly.update(plot, update, layout);
}

// One expert is a colour, several are stripes of theirs, none is no colour.
function colour(experts) {
  const found = experts.map((expert) => MASKS[expert % MASKS.length]);
  if (found.length === 0) return "";
  if (found.length === 1) return found[0];
  const stripes = found.map((c, i) => `${c} ${4 * i}px ${4 * i + 4}px`);
  return `repeating-linear-gradient(45deg, ${stripes.join(", ")})`;
}

function changeLayer(row, layer) {
  for (const token of row.querySelectorAll("b")) {
    const experts = token.dataset.experts.split(",")[layer].split(".").filter((number) => number !== "");
    token.style.background = colour(experts);
    token.title = experts.length ? "experts " + experts.join(", ") : "no expert";
  }
}

for (const holder of document.querySelectorAll(".plot")) draw(holder);
for (const group of document.querySelectorAll("[data-axes]")) {
  group.addEventListener("click", (event) => {
    if (!event.target.dataset.axis) return;
    press(group, event.target);
    changeAxis(document.getElementById(group.dataset.axes), event.target.dataset.axis);
  });
}
for (const group of document.querySelectorAll("[data-shows]")) {
  group.addEventListener("click", (event) => {
    if (!event.target.dataset.show) return;
    press(group, event.target);
    for (const part of document.querySelectorAll("." + group.dataset.shows)) part.hidden = part.dataset.name !== event.target.dataset.show;
  });
}
for (const select of document.querySelectorAll("select[data-row]")) {
  const row = document.getElementById(select.dataset.row);
  const change = () => changeLayer(row, Number(select.value));
  select.addEventListener("change", change);
  change();
}
document.documentElement.dataset.ready = "yes";
