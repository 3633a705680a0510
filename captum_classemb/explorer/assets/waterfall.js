// The ledger of the chosen class: what every part adds to its logit.

import { fixed } from "./numbers.js";

export const VIEWS = ["Parts", "Blocks", "Heads", "Patches"];
const LARGEST = 12;

// The steps of a view, in the order in which they are added up; together they are the logit.
export function steps(explorer, view) {
  const k = explorer.focus;
  const entry = (name) => explorer.arrays[`ledger.${name}`];
  const sum = (name) => d3.sum(entry(name).row(k));
  const heads = entry("heads").shape[2];
  const start = [{ label: "Embedding", value: sum("embedding") }];
  const prefix = { label: "Attention to prefix tokens", value: sum("prefix") };
  const mlps = { label: "MLPs", value: sum("mlp") };
  const end = [{ label: "Biases", value: sum("bias") }];
  if (sum("pool")) end.unshift({ label: "Pool", value: sum("pool") });
  const patches = { label: "Attention to patches", value: sum("patches") };
  if (view === "Blocks") {
    const blocks = d3.range(explorer.blocks).flatMap((b) => [
      {
        label: `Block ${b}, attention`,
        value: d3.sum(entry("heads").row(k, b)) + d3.sum(entry("prefix").row(k, b)),
        block: b,
      },
      { label: `Block ${b}, MLP`, value: entry("mlp").at(k, b) },
    ]);
    return [...start, ...blocks, ...end];
  }
  if (view === "Heads") {
    const values = Array.from(entry("heads").row(k), (value, i) => ({
      label: `Block ${Math.floor(i / heads)}, head ${i % heads}`,
      value,
      block: Math.floor(i / heads),
      head: 1 + (i % heads),
    }));
    return [...start, ...leading(values, "other heads"), prefix, mlps, ...end];
  }
  if (view === "Patches") {
    const values = Array.from(entry("patches").row(k), (value, i) => ({
      label: explorer.tokenName(explorer.prefix + i).replace(" in", ":"),
      value,
      token: explorer.prefix + i,
    }));
    return [...start, ...leading(values, "other patches"), prefix, mlps, ...end];
  }
  return [...start, patches, prefix, mlps, ...end];
}

function leading(values, others) {
  const order = values.toSorted((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const rest = order.slice(LARGEST);
  if (!rest.length) return order;
  return [
    ...order.slice(0, LARGEST),
    { label: `${rest.length} ${others}`, value: d3.sum(rest, ({ value }) => value) },
  ];
}

export function showLedger(explorer, view) {
  const box = document.getElementById("waterfall");
  const caption = document.getElementById("ledgerCaption");
  if (!explorer.facts.hasLedger || explorer.focus < 0) {
    caption.textContent = explorer.facts.hasLedger
      ? `The ledger is on this page for the leading classes: ${explorer.name()} is none of them.`
      : "The logits of this model have no exact ledger.";
    box.replaceChildren();
    return;
  }
  const score = explorer.arrays["ledger.score"].at(explorer.focus);
  let sum = 0;
  const bars = steps(explorer, view).map((step) => {
    const from = sum;
    sum += step.value;
    return { ...step, from, to: sum };
  });
  caption.textContent = `Every term of the logit of ${explorer.name()}, ${fixed(score)}; `
    + `the terms add up to ${fixed(sum, 4)}.`;
  const total = { label: "Logit", from: 0, to: sum, value: sum, total: true };
  const rows = [...bars, total];
  const color = (row) =>
    row.total ? "var(--total)" : row.value < 0 ? "var(--against)" : "var(--for)";
  const narrow = box.clientWidth < 560;
  const svg = Plot.plot({
    width: box.clientWidth,
    height: 44 + rows.length * (rows.length > 30 ? 18 : 24),
    marginLeft: narrow ? 150 : 190,
    marginRight: 56,
    marginTop: 30,
    marginBottom: 10,
    style: { fontSize: narrow ? "11px" : "12.5px" },
    ariaLabel: caption.textContent,
    x: { axis: "top", label: "logit", grid: true, insetLeft: 4, ticks: narrow ? 4 : 8 },
    y: { domain: rows.map(({ label }) => label), label: null, tickSize: 0, padding: 0.22 },
    color: { type: "identity" },
    marks: [
      Plot.ruleX([0], { stroke: "var(--faint)" }),
      Plot.barX(rows, { x1: "from", x2: "to", y: "label", fill: color, rx: 1.5 }),
      Plot.link(d3.pairs(bars), {
        x1: ([before]) => before.to, x2: ([before]) => before.to,
        y1: ([before]) => before.label, y2: ([, after]) => after.label,
        stroke: "var(--faint)", strokeWidth: 0.8,
      }),
      Plot.text(rows, {
        x: ({ from, to }) => Math.max(from, to), y: "label", text: ({ value }) => fixed(value),
        textAnchor: "start", dx: 5, fill: "var(--ink)", stroke: "var(--panel)", strokeWidth: 3,
      }),
    ],
  });
  d3.select(svg)
    .select("[aria-label=bar]")
    .selectAll("rect")
    .on("click", (_, i) => {
      const { token, block, head } = rows[i];
      if (token !== undefined) explorer.set({ token });
      else if (block !== undefined) explorer.set({ block, head: head ?? 0 });
    });
  box.replaceChildren(svg);
}
