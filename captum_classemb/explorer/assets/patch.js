// The panel of one token: its score, its top classes, its history over depth.

import { bound, percent, signed } from "./numbers.js";

export function showPatch(explorer) {
  const text = (id, content) => {
    document.getElementById(id).textContent = content;
  };
  text("token", explorer.tokenName());
  text("topTitle", `Top classes after block ${explorer.depth}`);
  const map = explorer.map();
  const patch = explorer.reading - explorer.prefix;
  text(
    "score",
    patch < 0
      ? "A token of no patch: it has no score on the map."
      : `${explorer.method.title} for ${explorer.name()}: `
        + `${signed(map.scores[patch])} (± ${bound(map.step / 2)})`,
  );
  listTop(explorer);
  drawHistory(explorer);
}

function listTop(explorer) {
  d3.select("#top")
    .selectAll("li")
    .data(explorer.topClasses())
    .join((enter) => {
      const item = enter.append("li");
      item.append("span").attr("class", "name");
      item.append("span").attr("class", "share");
      item.append("span").attr("class", "bar").append("i");
      return item;
    })
    .classed("chosen", ({ cls }) => cls === explorer.cls)
    .each(function fill({ name, share }) {
      const item = d3.select(this);
      item.select(".name").text(name).attr("title", name);
      item.select(".share").text(percent(share));
      item.select("i").style("width", `${100 * share}%`);
    });
}

function drawHistory(explorer) {
  const box = document.getElementById("history");
  const curve = (k) =>
    explorer.identifiability(k).map((value, block) => ({ k, block, value }));
  const others = explorer.facts.focus.map((_, k) => k).filter((k) => k !== explorer.focus);
  const chosen = explorer.focus < 0 ? [] : curve(explorer.focus);
  const name = ({ k }) => explorer.name(explorer.facts.focus[k]);
  const tip = ({ k, block, value }) =>
    `${explorer.name(explorer.facts.focus[k])}\nblock ${block}: ${value.toFixed(3)}`;
  const lines = { x: "block", y: "value", z: "k" };
  const all = others.flatMap(curve);
  const svg = Plot.plot({
    width: box.clientWidth,
    height: 210,
    marginLeft: 40,
    marginBottom: 36,
    style: { fontSize: "12px" },
    ariaLabel: `Class identifiability of ${explorer.tokenName()} after each block`,
    x: { label: "block", domain: [0, Math.max(explorer.blocks - 1, 1)], interval: 1, ticks: 8, tickFormat: "d" },
    y: { label: "class identifiability", domain: [0, 1], grid: true, ticks: 5 },
    marks: [
      Plot.ruleX([explorer.depth], { stroke: "var(--faint)", strokeDasharray: "3 3" }),
      Plot.line(all, { ...lines, stroke: "var(--other)", strokeWidth: 1.2 }),
      Plot.line(chosen, { ...lines, stroke: "var(--accent)", strokeWidth: 2.6 }),
      Plot.dot(chosen, { ...lines, fill: "var(--accent)", r: 3 }),
      Plot.text(chosen.slice(-1), {
        x: "block", y: "value", text: name, dy: 14, textAnchor: "end", fontWeight: 600,
        fill: "var(--accent)", stroke: "var(--panel)", strokeWidth: 5,
      }),
      Plot.tip([...all, ...chosen], Plot.pointer({ ...lines, title: tip })),
    ],
  });
  box.replaceChildren(svg);
}
