// Colours of scores: diverging about 0, or the upper half alone where nothing is negative.

// One patch in a hundred may lie beyond the range: single patches can outshine all others.
const CLIPPED = 0.01;

export function colorScale(scores, signed, colors) {
  const sizes = Float32Array.from(scores, Math.abs).sort();
  const limit = d3.quantileSorted(sizes, 1 - CLIPPED) || sizes[sizes.length - 1] || 1;
  const low = signed ? -limit : 0;
  const first = signed ? 0 : 128;
  const last = colors.shape[0] - 1;
  return {
    low,
    high: limit,
    first,
    last,
    color(score) {
      const share = Math.min(Math.max((score - low) / (limit - low), 0), 1);
      return colors.row(Math.round(first + share * (last - first)));
    },
  };
}

export function drawRamp(canvas, scale, colors) {
  const context = canvas.getContext("2d");
  const width = canvas.width;
  const pixels = context.createImageData(width, 1);
  for (let x = 0; x < width; x++) {
    const index = Math.round(scale.first + (x / (width - 1)) * (scale.last - scale.first));
    pixels.data.set([...colors.row(index), 255], 4 * x);
  }
  context.putImageData(pixels, 0, 0);
}
