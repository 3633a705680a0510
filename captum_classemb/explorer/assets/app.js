// The page: numbers unpacked, controls made, everything redrawn when a choice changes.

import { unpack } from "./data.js";
import { percent } from "./numbers.js";
import { Explorer } from "./state.js";
import { makeStage } from "./stage.js";
import { showPatch } from "./patch.js";
import { showHeads } from "./heads.js";
import { VIEWS, showLedger } from "./waterfall.js";

const $ = (id) => document.getElementById(id);

const explorer = new Explorer(await unpack($("data").textContent));
const { facts, arrays } = explorer;
const stage = await makeStage(explorer);
let view = VIEWS[0];

// -- controls

function buttons(parent, role, entries, choose) {
  return d3.select($(parent))
    .selectAll("button")
    .data(entries)
    .join("button")
    .attr("type", "button")
    .attr("role", role)
    .text((entry) => entry.title ?? entry)
    .on("click", (_, entry) => choose(entry));
}

const methods = buttons("methods", "radio", facts.methods, (method) => explorer.set({ method }));
const views = buttons("views", "radio", VIEWS, (chosen) => {
  view = chosen;
  redraw();
});
const chips = buttons("focus", null, facts.focus, (cls) => explorer.set({ cls }))
  .text((cls) => `${explorer.name(cls)} `);
chips.append("span").attr("class", "share").text((cls) => percent(arrays.probabilities.at(cls)));
const prefixes = buttons("prefix", null, facts.prefix, (name) =>
  explorer.set({ token: facts.prefix.indexOf(name), hovered: null }));

$("names").append(...facts.names.map((name) => new Option(name)));
$("class").addEventListener("change", search);
$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});

function search() {
  const wanted = $("class").value.trim().toLowerCase();
  if (!wanted) return;
  const names = facts.names.map((name) => name.toLowerCase());
  const exact = names.indexOf(wanted);
  const found = exact >= 0 ? exact : names.findIndex((name) => name.includes(wanted));
  if (found >= 0 && facts.methods.some((method) => explorer.has(method, found))) {
    explorer.set({ cls: found });
  } else {
    say(found < 0
      ? `No class is called “${$("class").value}”.`
      : `${facts.names[found]} is not among the most probable classes, which this page holds.`);
  }
}

$("block").max = explorer.blocks - 1;
$("block").addEventListener("input", (event) =>
  explorer.set({ block: Number(event.target.value) }));
$("all").addEventListener("click", () =>
  explorer.set({ block: explorer.block === null ? explorer.blocks - 1 : null }));
$("head").addEventListener("change", (event) => {
  const head = Number(event.target.value);
  explorer.set({ head, block: explorer.block ?? explorer.blocks - 1 });
});
$("show").addEventListener("change", (event) => stage.show(event.target.checked));
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey) return;
  if (event.key === "[") explorer.set({ block: Math.max(explorer.depth - 1, 0) });
  if (event.key === "]") explorer.set({ block: Math.min(explorer.depth + 1, explorer.blocks - 1) });
  if (event.key === "a") explorer.set({ block: null });
  if (event.key === "m") $("show").click();
});

// -- what they show

function say(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
}

function showControls() {
  methods.attr("aria-checked", (method) => method === explorer.method);
  views.attr("aria-checked", (name) => name === view);
  chips.attr("aria-pressed", (cls) => cls === explorer.cls);
  prefixes.attr("aria-pressed", (_, i) => i === explorer.token);
  $("class").value = explorer.name();
  $("all").setAttribute("aria-pressed", explorer.block === null);
  $("block").value = explorer.depth;
  $("where").value = explorer.block === null ? "all blocks" : `block ${explorer.block}`;
  const heads = d3.range(1, explorer.headCount());
  $("head").replaceChildren(
    new Option(heads.length ? "all heads" : "none", 0),
    ...heads.map((head) => new Option(`head ${head - 1}`, head)),
  );
  $("head").value = explorer.head;
  $("head").disabled = !heads.length || !explorer.hasParts();
  $("caption").textContent = `${explorer.name()}: ${caption(heads.length)}`;
  say(explorer.note);
}

function caption(heads) {
  if (!explorer.map().part) return explorer.method.caption;
  const which = explorer.head ? `head ${explorer.head - 1}` : "all heads";
  return `${explorer.method.title}, block ${explorer.block}${heads ? `, ${which}` : ""}`;
}

function redraw() {
  showControls();
  showPatch(explorer);
  showHeads(explorer);
  showLedger(explorer, view);
}

explorer.onChange((changed) => {
  // What only moves over the image leaves the map as it is.
  if (changed.every((name) => name === "token" || name === "hovered")) {
    stage.outline();
    prefixes.attr("aria-pressed", (_, i) => i === explorer.token);
    showPatch(explorer);
  } else {
    stage.print();
    redraw();
  }
});

const best = d3.maxIndex(arrays.probabilities.values);
$("title").textContent = facts.title;
$("summary").textContent = `${facts.model} sees ${explorer.name(best)} `
  + `(${percent(arrays.probabilities.at(best))}). ${explorer.blocks} blocks, `
  + `${facts.grid.join("×")} patches, ${facts.names.length} classes.`;
$("precision").textContent = "Scores of maps are stored in 8 bits: each map in steps of its own, and "
  + "right to half a step, which stands behind ±. Probabilities are right to 0.00001, ranks are "
  + "exact, terms of the ledger are 32-bit floats.";
$("notes").textContent = facts.notes.join(" ");

stage.print();
redraw();
let width = $("waterfall").clientWidth;
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width === width) return;
  width = contentRect.width;
  redraw();
}).observe($("waterfall"));
document.documentElement.dataset.ready = "true";
