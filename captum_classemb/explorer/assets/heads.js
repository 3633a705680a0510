// Every block and head of the chosen method: what it says of the class, summed over the patches.

import { signed } from "./numbers.js";
import { colorScale } from "./colors.js";

export function showHeads(explorer) {
  const box = document.getElementById("cells");
  const caption = document.getElementById("partsCaption");
  if (!explorer.hasParts()) {
    caption.textContent = `${explorer.name()} is on this page with its summed map alone.`;
    box.replaceChildren();
    return;
  }
  const totals = explorer.totals();
  const count = totals.shape[2];
  // With a single column there are no heads: the method reads tokens.
  const heads = count === 1 ? [0] : d3.range(1, count);
  const cells = d3.cross(d3.range(explorer.blocks), heads).map(([block, head]) => ({
    block,
    head,
    value: totals.at(explorer.focus, block, head),
  }));
  const scale = colorScale(
    cells.map(({ value }) => value),
    cells.some(({ value }) => value < 0),
    explorer.arrays.colors,
  );
  const label = ({ block, head, value }) =>
    `block ${block}${head ? `, head ${head - 1}` : ""}: ${signed(value)}`;
  caption.textContent = `${explorer.method.title} for ${explorer.name()}, summed over the patches. `
    + (count > 9 ? "Columns are heads. " : "") + "Choose a cell to see its map.";
  const chosen = ({ block, head }) =>
    block === explorer.block && (head === explorer.head || explorer.head === 0);
  const svg = Plot.plot({
    width: box.clientWidth,
    height: 46 + explorer.blocks * (explorer.blocks > 14 ? 15 : 22),
    marginLeft: 40,
    marginTop: 30,
    marginBottom: 4,
    padding: 0.08,
    style: { fontSize: "12px" },
    ariaLabel: caption.textContent,
    x: {
      axis: "top", label: null, tickSize: 0,
      tickFormat: (head) => (head ? `${heads.length > 8 ? "" : "head "}${head - 1}` : "all tokens"),
    },
    y: { label: "block", tickSize: 0 },
    color: { type: "identity" },
    marks: [
      Plot.cell(cells, {
        x: "head", y: "block", rx: 2, fill: ({ value }) => `rgb(${scale.color(value).join()})`,
        title: label, ariaLabel: label,
      }),
      Plot.cell(cells.filter(chosen), {
        x: "head", y: "block", rx: 2, stroke: "var(--accent)", strokeWidth: 2.5, inset: -1,
        pointerEvents: "none",
      }),
    ],
  });
  d3.select(svg)
    .select("[aria-label=cell]")
    .selectAll("rect")
    .on("click", (_, i) => {
      const { block, head } = cells[i];
      explorer.set({ block, head });
    });
  box.replaceChildren(svg);
}
