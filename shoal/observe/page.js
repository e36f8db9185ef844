"use strict";
// What the page can do beside being read: read values under the pointer, hide series, change to log scale, smooth.
// All of it is drawn already; nothing here computes a curve.
document.documentElement.classList.add("js");

const minus = (text) => text.replace("-", "\u2212");

function significant(value, digits) {
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e9)) {
    return minus(value.toExponential(digits - 2).replace(/\.?0+e/, "e").replace("e+", "e"));
  }
  return minus(value.toLocaleString("en", { maximumSignificantDigits: digits }));
}

const forms = {
  figure: (value) => significant(value, 5),
  amount: (value) => significant(value, 4),
  share: (value) => significant(value * 100, 3) + " %",
  seconds: (value) => (value < 1 ? significant(value * 1000, 3) + " ms" : significant(value, 4) + " s"),
};

// 2 ** 16 -> "64 KiB"
function binarySize(bytes) {
  const power = Math.min(3, Math.max(0, Math.floor(Math.log2(bytes) / 10)));
  return significant(bytes / 1024 ** power, 3) + " " + ["B", "KiB", "MiB", "GiB"][power];
}

// What stands at the head of a reading; x of a size is its binary logarithm.
const heads = {
  step: (x) => "step " + x.toLocaleString("en"),
  time: (x) => forms.seconds(x),
  size: (x) => binarySize(2 ** x),
};

// The index of the last point at or before x; the nearest one with `near`.
function find(points, x, near) {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (points[middle] <= x) low = middle;
    else high = middle - 1;
  }
  if (near && low + 1 < points.length && points[low + 1] - x < x - points[low]) low += 1;
  return low;
}

function place(value, scale, log) {
  const [low, high] = log ? scale.map(Math.log) : scale;
  return ((log ? Math.log(value) : value) - low) / (high - low);
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never as HTML: names come from the run
  return made;
}

function enliven(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const hidden = new Set();
  let at = null; // x of the last reading, for the arrow keys

  for (const key of figure.querySelectorAll(".key")) {
    key.addEventListener("click", () => {
      const number = Number(key.dataset.series);
      const hide = !hidden.delete(number);
      if (hide) hidden.add(number);
      key.setAttribute("aria-pressed", String(!hide));
      for (const shape of figure.querySelectorAll(`.area [data-series="${number}"]`)) shape.classList.toggle("gone", hide);
    });
  }

  for (const tool of figure.querySelectorAll(".tool")) {
    tool.addEventListener("click", () => {
      const on = tool.getAttribute("aria-pressed") !== "true";
      tool.setAttribute("aria-pressed", String(on));
      if (tool.dataset.tool === "smooth") figure.classList.toggle("smoothed", on);
      else for (const plot of figure.querySelectorAll(".plot")) plot.hidden = (plot.dataset.scale === "log") !== on;
    });
  }

  function clear(area) {
    for (const old of area.querySelectorAll(".cross, .spot, .reading")) old.remove();
  }

  function read(area, x) {
    clear(area);
    const log = area.parentElement.dataset.scale === "log";
    const shown = data.series.filter((series) => !hidden.has(series.group));
    // The reading stands at a step that was logged: the nearest one of all series.
    const steps = shown.map((series) => series.at[find(series.at, x, !data.stacked)]);
    if (!steps.length) return;
    at = steps.reduce((best, step) => (Math.abs(step - x) < Math.abs(best - x) ? step : best));
    const across = place(at, data.x, false);
    const cross = element("div", "cross");
    cross.style.left = across * 100 + "%";
    const reading = element("div", "reading");
    const time = data.xName !== "step";
    reading.append(element("b", "", heads[data.xName](at)));
    for (const series of shown) {
      const index = find(series.at, at, true);
      const value = series.y[index];
      // Figures that were measured now and then are read near their own step only.
      if (Math.abs(series.at[index] - at) > (data.x[1] - data.x[0]) / 60) continue;
      const row = element("span", series.colour);
      const text = typeof value === "string" ? value : forms[data.form](value);
      const elsewhere = !time && !data.stacked && series.at[index] !== at;
      const name = series.name + (elsewhere ? ` (step ${series.at[index].toLocaleString("en")})` : "");
      row.append(element("i"), document.createTextNode(name), element("u", "", text));
      reading.append(row);
      if (data.stacked || typeof value === "string") continue;
      const up = place(value, log ? data.log : data.linear, log);
      if (!(up >= 0 && up <= 1)) continue;
      const spot = element("div", "spot " + series.colour);
      spot.style.left = place(series.at[index], data.x, false) * 100 + "%";
      spot.style.top = (1 - up) * 100 + "%";
      area.append(spot);
    }
    area.append(cross, reading);
    // Beside the line, on the side with room, and never beyond the plot.
    const width = area.clientWidth;
    const own = reading.offsetWidth;
    const beside = across * width + 14;
    const left = beside + own > width ? across * width - own - 14 : beside;
    reading.style.left = Math.max(-40, Math.min(left, width - own)) + "px";
  }

  for (const area of figure.querySelectorAll(".area")) {
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      read(area, data.x[0] + share * (data.x[1] - data.x[0]));
    });
    area.addEventListener("pointerleave", () => clear(area));
    area.addEventListener("blur", () => clear(area));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") clear(area);
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      event.preventDefault();
      const steps = data.series.find((series) => !hidden.has(series.group))?.at ?? [];
      if (!steps.length) return;
      const index = at === null ? 0 : find(steps, at, true) + way;
      read(area, steps[Math.min(steps.length - 1, Math.max(0, index))]);
    });
  }
}

for (const figure of document.querySelectorAll("figure.chart")) enliven(figure);
