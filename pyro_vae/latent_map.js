// The page has the points as JSON and a sheet of images that the decoder made on a grid of the plane. The script
// draws the points, and shows the image of the grid cell under the pointer.
"use strict";
const map = JSON.parse(document.getElementById("map").textContent);
const [plane, points, cell, image, where, sheet] = ["plane", "points", "cell", "image", "where", "sheet"].map(
  (id) => document.getElementById(id),
);
let [column, row] = [map.steps >> 1, map.steps >> 1]; // of the cell, from the lower left

// The image of a cell of the grid, and z at its centre.
function show(i, j) {
  [column, row] = [i, j].map((k) => Math.min(Math.max(k, 0), map.steps - 1));
  const { width, height, steps } = map;
  const pen = image.getContext("2d");
  pen.clearRect(0, 0, width, height);
  pen.drawImage(sheet, column * width, (steps - 1 - row) * height, width, height, 0, 0, width, height);
  cell.style.left = `${(100 * column) / steps}%`;
  cell.style.bottom = `${(100 * row) / steps}%`;
  const at = (k) => (map.low[k] + ([column, row][k] + 0.5) * (map.size / steps)).toFixed(2).replace("-", "−");
  where.textContent = map.dims.map((dim, k) => `z[${dim}] = ${at(k)}`).join("\n");
}

function draw() {
  const side = plane.clientWidth, sharp = window.devicePixelRatio || 1;
  points.width = points.height = side * sharp;
  const pen = points.getContext("2d");
  pen.scale(sharp, sharp);
  const place = (z, k) => (k ? 1 - (z - map.low[1]) / map.size : (z - map.low[0]) / map.size) * side;
  pen.fillStyle = pen.strokeStyle = getComputedStyle(plane).color;
  pen.font = "12px system-ui, sans-serif";
  const step = [1, 2, 5, 10, 20, 50, 100, 1000, 1e4].find((s) => map.size / s <= 10) || map.size / 5;
  for (const k of [0, 1]) {
    for (let tick = Math.ceil(map.low[k] / step) * step; tick < map.low[k] + map.size; tick += step) {
      const at = place(tick, k);
      pen.globalAlpha = 0.15;
      pen.fillRect(k ? 0 : at, k ? at : 0, k ? side : 1, k ? 1 : side);
      pen.globalAlpha = 0.75;
      const text = String(tick).replace("-", "−");
      k ? pen.fillText(text, 4, at - 3) : pen.fillText(text, at + 3, side - 5);
    }
  }
  pen.globalAlpha = 0.8;
  for (const [x, y, label] of map.points) {
    pen.fillStyle = map.colours[label];
    pen.beginPath();
    pen.arc(place(x, 0), place(y, 1), map.points.length > 2000 ? 1.6 : 2.4, 0, 7);
    pen.fill();
  }
}

function follow(event) {
  const box = plane.getBoundingClientRect();
  const u = (event.clientX - box.left) / box.width, v = (box.bottom - event.clientY) / box.height;
  show(Math.floor(u * map.steps), Math.floor(v * map.steps));
}

plane.addEventListener("pointermove", follow);
plane.addEventListener("pointerdown", follow);
plane.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
  if (move) {
    show(column + move[0], row + move[1]);
    event.preventDefault();
  }
});
window.addEventListener("resize", draw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
cell.style.width = cell.style.height = `${100 / map.steps}%`;
draw();
sheet.decode().then(() => show(column, row));
