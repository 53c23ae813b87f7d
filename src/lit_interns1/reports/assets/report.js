// Tooltips. A curve's values are read back from its path: data-frame holds the edges of the plot in the coordinates of
// the picture (left, right, bottom, top), data-range what they stand for.
"use strict";
const tip = document.getElementById("tip");
const numbers = (element, name) => element.dataset[name].split(" ").map(Number);
const short = (value) => {
  for (const [factor, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= Math.max(factor, 1e4)) return +(value / factor).toPrecision(4) + suffix;
  return String(+value.toPrecision(4));
};
const text = (tag, content, parent) => parent.appendChild(Object.assign(document.createElement(tag), { textContent: content }));

function position(svg, event) {
  const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
  return [(event.clientX - box.left) * view.width / box.width, (event.clientY - box.top) * view.height / box.height];
}

function show(event, heading, rows) {
  tip.replaceChildren();
  text("div", heading, tip);
  for (const [name, value, colour] of rows) {
    const row = text("div", "", tip);
    if (colour) text("i", "", row).className = "swatch " + colour;
    row.append(name);
    text("b", value, row);
  }
  tip.hidden = false;
  const right = event.clientX + 18 + tip.offsetWidth > innerWidth;
  tip.style.left = (right ? event.clientX - 14 - tip.offsetWidth : event.clientX + 18) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)) + "px";
}

for (const svg of document.querySelectorAll("svg.chart")) {
  const [left, right, bottom, top] = numbers(svg, "frame"), [x0, x1, y0, y1] = numbers(svg, "range");
  const hair = document.createElementNS(svg.namespaceURI, "line");
  hair.setAttribute("class", "hair");
  let curves = null;
  svg.addEventListener("pointermove", (event) => {
    curves ??= [...svg.querySelectorAll("path")].map((path) => ({
      name: path.dataset.name, colour: path.classList[1],
      points: path.getAttribute("d").slice(1).split("L").map((pair) => pair.split(",").map(Number)),
    }));
    const [x] = position(svg, event);
    const rows = curves.map((curve) => {
      const near = curve.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      return { near, row: [curve.name, short(y0 + (bottom - near[1]) / (bottom - top) * (y1 - y0)), curve.colour] };
    });
    const at = rows.reduce((a, b) => (Math.abs(b.near[0] - x) < Math.abs(a.near[0] - x) ? b : a)).near[0];
    for (const [name, value] of [["x1", at], ["x2", at], ["y1", top], ["y2", bottom]]) hair.setAttribute(name, value);
    svg.append(hair);
    show(event, short(x0 + (at - left) / (right - left) * (x1 - x0)), rows.map((entry) => entry.row));
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; hair.remove(); });
}

// Heat-maps: blue and red are the sign of load - 1, the opacity is its size.
for (const svg of document.querySelectorAll("svg.heat")) {
  const [left, right, bottom, top] = numbers(svg, "frame"), [x0, x1, , experts] = numbers(svg, "range");
  let pixels = null;
  svg.addEventListener("pointerenter", async () => {
    const image = new Image();
    image.src = svg.querySelector("image").getAttribute("href");
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    pixels = context.getImageData(0, 0, image.width, image.height);
  });
  svg.addEventListener("pointermove", (event) => {
    const [x, y] = position(svg, event), across = (x - left) / (right - left), down = (y - top) / (bottom - top);
    if (!pixels || across < 0 || across >= 1 || down < 0 || down >= 1) { tip.hidden = true; return; }
    const at = 4 * (Math.floor(down * pixels.height) * pixels.width + Math.floor(across * pixels.width));
    const distance = pixels.data[at + 3] / 255, load = 1 + (pixels.data[at] > pixels.data[at + 2] ? distance : -distance);
    const value = (load >= 2 ? "≥ " : "") + load.toFixed(2) + " × uniform";
    show(event, short(x0 + across * (x1 - x0)), [["expert " + Math.floor((1 - down) * experts), value, ""]]);
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
