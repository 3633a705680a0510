// The numbers of the page: a directory in JSON and the arrays it names (see page.py).

const TYPES = {
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  int32: Int32Array,
  float32: Float32Array,
};

// An array of any shape; `row(i, j, …)` is what lies below these first indices.
class Tensor {
  constructor(values, shape) {
    this.values = values;
    this.shape = shape;
  }

  row(...indices) {
    let offset = 0;
    indices.forEach((index, axis) => {
      offset = offset * this.shape[axis] + index;
    });
    const size = this.shape.slice(indices.length).reduce((a, b) => a * b, 1);
    return this.values.subarray(offset * size, (offset + 1) * size);
  }

  at(...indices) {
    return this.row(...indices)[0];
  }
}

export async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const facts = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const arrays = {};
  for (const [name, { type, shape, offset }] of Object.entries(facts.arrays)) {
    const size = shape.reduce((a, b) => a * b, 1);
    arrays[name] = new Tensor(new TYPES[type](buffer, 8 + length + offset, size), shape);
  }
  return { facts, arrays };
}
