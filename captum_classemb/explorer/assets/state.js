// What is chosen, and what the numbers say of the choice.

const PROBABILITY_STEPS = 65535;

export class Explorer {
  constructor({ facts, arrays }) {
    this.facts = facts;
    this.arrays = arrays;
    [, this.blocks, this.tokens] = arrays.ranks.shape;
    const patches = facts.grid[0] * facts.grid[1];
    this.prefix = this.tokens - patches;
    this.method = facts.methods[0];
    this.cls = facts.focus[0];
    this.block = null; // null: all blocks together
    this.head = 0; // 0: all heads together
    this.token = this.prefix + this.strongestPatch();
    this.hovered = null;
    this.note = "";
    this.listeners = [];
  }

  onChange(listener) {
    this.listeners.push(listener);
  }

  set(changes) {
    this.note = "";
    Object.assign(this, changes);
    if (!this.has(this.method, this.cls)) {
      const asked = this.method;
      this.method = this.facts.methods.find((method) => this.has(method, this.cls)) ?? asked;
      this.note = `${asked.title} is on this page for the leading classes alone: `
        + `${this.name()} is shown by ${this.method.title}.`;
    }
    if (this.head >= this.headCount()) this.head = 0;
    if (this.block === null) this.head = 0;
    else if (!this.hasParts()) {
      this.note = `Single blocks are on this page for the leading classes alone: `
        + `the map of ${this.name()} is ${this.method.whole}.`;
    }
    this.listeners.forEach((listener) => listener(Object.keys(changes)));
  }

  name(cls = this.cls) {
    return this.facts.names[cls];
  }

  // The token that the panel reads: what is under the pointer, else what was chosen.
  get reading() {
    return this.hovered ?? this.token;
  }

  // The block whose tokens are read: the last one, where the map sums them all.
  get depth() {
    return this.block ?? this.blocks - 1;
  }

  has(method, cls) {
    return this.arrays[`${method.key}.classes`].values.includes(cls);
  }

  headCount() {
    return this.arrays[`${this.method.key}.parts`].shape[2];
  }

  // The place of the class among those in focus, or −1.
  get focus() {
    return this.facts.focus.indexOf(this.cls);
  }

  hasParts() {
    return this.focus >= 0 && this.focus < this.arrays[`${this.method.key}.parts`].shape[0];
  }

  // The map in view: its scores, the size of a step, whether it can be negative.
  map() {
    const { key, mapsZero, partsZero } = this.method;
    const part = this.block !== null && this.hasParts();
    const place = part
      ? [this.focus, this.block, this.head]
      : [this.arrays[`${key}.classes`].values.indexOf(this.cls)];
    const zero = part ? partsZero : mapsZero;
    const levels = this.arrays[part ? `${key}.parts` : `${key}.maps`].row(...place);
    const step = this.arrays[part ? `${key}.partSteps` : `${key}.mapSteps`].at(...place);
    const scores = Float32Array.from(levels, (level) => (level - zero) * step);
    return { scores, step, signed: zero !== 0, part };
  }

  strongestPatch() {
    return d3.maxIndex(this.map().scores);
  }

  totals() {
    return this.arrays[`${this.method.key}.totals`];
  }

  topClasses(token = this.reading, block = this.depth) {
    const shares = this.arrays.topProbabilities.row(block, token);
    return Array.from(this.arrays.topClasses.row(block, token), (cls, i) => ({
      cls,
      name: this.name(cls),
      share: shares[i] / PROBABILITY_STEPS,
    }));
  }

  // Class identifiability of a token after every block, of one class in focus.
  identifiability(k, token = this.reading) {
    const count = this.facts.names.length;
    return d3.range(this.blocks).map((b) => 1 - this.arrays.ranks.at(k, b, token) / count);
  }

  tokenName(token = this.reading) {
    if (token < this.prefix) return `${this.facts.prefix[token]} token`;
    const patch = token - this.prefix;
    const columns = this.facts.grid[1];
    return `Patch in row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
  }
}
