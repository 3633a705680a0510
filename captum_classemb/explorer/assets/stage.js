// The image with its patches: the map printed over it, pointer and keys.

import { colorScale, drawRamp } from "./colors.js";
import { rounded, signed } from "./numbers.js";

const LEAST_SIZE = 560;

export async function makeStage(explorer) {
  const { facts, arrays } = explorer;
  const stage = document.getElementById("stage");
  const canvas = document.getElementById("canvas");
  const image = new Image();
  image.src = facts.image;
  await image.decode();
  const zoom = Math.max(1, Math.ceil(LEAST_SIZE / image.width));
  canvas.width = image.width * zoom;
  canvas.height = image.height * zoom;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const [rows, columns] = facts.grid;
  const cell = [canvas.width / columns, canvas.height / rows];
  const photo = photograph();
  const paper = grayPaper(photo);
  let shown = true;
  let printed = photo;

  function photograph() {
    context.imageSmoothingEnabled = zoom < 4;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  }

  function print() {
    const map = explorer.map();
    const scale = colorScale(map.scores, map.signed, arrays.colors);
    const inks = Array.from(map.scores, (score) => scale.color(score));
    printed = shown ? context.createImageData(canvas.width, canvas.height) : photo;
    if (shown) {
      for (let y = 0, i = 0; y < canvas.height; y++) {
        const row = Math.floor((y / canvas.height) * rows) * columns;
        for (let x = 0; x < canvas.width; x++, i++) {
          const ink = inks[row + Math.floor((x / canvas.width) * columns)];
          for (let c = 0; c < 3; c++) printed.data[4 * i + c] = ink[c] * paper[i];
          printed.data[4 * i + 3] = 255;
        }
      }
    }
    drawRamp(document.getElementById("ramp"), scale, arrays.colors);
    document.getElementById("low").textContent = map.signed ? rounded(scale.low) : "0";
    document.getElementById("high").textContent = signed(scale.high);
    outline();
  }

  function outline() {
    context.putImageData(printed, 0, 0);
    context.lineWidth = 1;
    context.strokeStyle = "rgba(0, 0, 0, 0.13)";
    context.beginPath();
    for (let c = 1; c < columns; c++) line(c * cell[0], 0, c * cell[0], canvas.height);
    for (let r = 1; r < rows; r++) line(0, r * cell[1], canvas.width, r * cell[1]);
    context.stroke();
    const patch = explorer.reading - explorer.prefix;
    if (patch < 0) return;
    const box = [(patch % columns) * cell[0], Math.floor(patch / columns) * cell[1], ...cell];
    for (const [width, color] of [[6, "#fff"], [3, "#111"]]) {
      context.lineWidth = width;
      context.strokeStyle = color;
      context.strokeRect(...box);
    }
  }

  function line(x0, y0, x1, y1) {
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
  }

  function tokenAt(event) {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return explorer.prefix + clamp(row, rows) * columns + clamp(column, columns);
  }

  stage.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse") return;
    const token = tokenAt(event);
    if (token !== explorer.hovered) explorer.set({ hovered: token });
  });
  stage.addEventListener("pointerleave", () => explorer.set({ hovered: null }));
  stage.addEventListener("click", (event) => explorer.set({ token: tokenAt(event), hovered: null }));
  stage.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const patch = Math.max(explorer.token - explorer.prefix, 0);
    const row = clamp(Math.floor(patch / columns) + move[0], rows);
    const column = clamp((patch % columns) + move[1], columns);
    explorer.set({ token: explorer.prefix + row * columns + column, hovered: null });
  });

  return {
    print,
    outline,
    show(yes) {
      shown = yes;
      print();
    },
  };
}

function clamp(index, count) {
  return Math.min(Math.max(index, 0), count - 1);
}

// The image in gray, stretched and lightened so that colours can be told apart on it.
function grayPaper(photo) {
  const gray = new Float32Array(photo.data.length / 4);
  for (let i = 0; i < gray.length; i++) {
    const [red, green, blue] = photo.data.subarray(4 * i, 4 * i + 3);
    gray[i] = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }
  const sorted = gray.slice().sort();
  const low = d3.quantileSorted(sorted, 0.02);
  const range = Math.max(d3.quantileSorted(sorted, 0.98) - low, 1e-3);
  return gray.map((value) => 0.66 + 0.34 * Math.min(Math.max((value - low) / range, 0), 1));
}
