// One row per MoE layer, two drawings on one axis: the load of every expert now, and the layer's entropy over time.
// Packed rows come as bytes: `level` is an index into the load table plus one, 0 for a load of exactly zero.

const LABEL = 46, NOW = 54, GAP = 26, AXIS = 20, TOP = 6;
const WIDEST = 76;  // pixels of a cell at most: few experts leave more room for the past
const LOWEST = 0.7;  // distance from the maximum at which the entropy rows reach the end of the ramp

class LoadMap {
  constructor(root, { setStateValue }) {
    this.root = root;
    this.canvas = root.querySelector("canvas");
    this.tip = root.querySelector(".tip");
    this.voice = root.querySelector(".quiet");
    this.select = setStateValue;
    this.cursor = null;
    this.canvas.onmousemove = (event) => this.hover(event);
    this.canvas.onmouseleave = () => hideTip(this.tip);
    this.canvas.onclick = (event) => this.pick(this.at(event));
    this.canvas.onkeydown = (event) => this.key(event);
  }

  update({ data, setStateValue }) {
    this.select = setStateValue;
    this.data = data;
    this.level = decode(data.level);
    this.load = decode(data.load, Uint16Array);
    this.smooth = decode(data.smooth, Uint16Array);
    this.history = decode(data.history);
    this.canvas.setAttribute("aria-label", data.alt);
    this.legend();
    this.draw();
  }

  shape() {
    const { layers, experts } = this.data;
    const width = this.root.querySelector(".frame").clientWidth;
    const room = width - LABEL - NOW - GAP;
    const cell = Math.min(WIDEST, (room - Math.max(120, Math.round(0.3 * room))) / experts);
    const past = room - cell * experts;
    const row = Math.max(9, Math.min(34, Math.floor(460 / layers)));
    return { layers, experts, width, past, row, cell, height: TOP + layers * row + AXIS, now: LABEL + cell * experts,
      from: LABEL + cell * experts + NOW + GAP };
  }

  draw() {
    if (!this.data) return;
    const s = this.shape();
    const pen = fit(this.canvas, s.width, s.height);
    const ink = inkOf(this.root);
    const ramp = rampOf(`load_${themeOf(this.root)}`);
    this.cells(pen, s, ink, ramp);
    this.past(pen, s, ink, ramp);
    this.labels(pen, s, ink);
    this.mark(pen, s, ink);
  }

  cells(pen, s, ink, ramp) {
    const gap = s.cell > 7 ? 1 : 0, sill = s.row > 12 ? 1 : 0;
    for (let layer = 0; layer < s.layers; layer++) {
      for (let expert = 0; expert < this.data.widths[layer]; expert++) {
        const level = this.level[layer * s.experts + expert];
        const x = LABEL + expert * s.cell, y = TOP + layer * s.row;
        pen.fillStyle = level === 0 ? ramp[0] : ramp[level - 1];
        pen.fillRect(x, y, Math.max(s.cell - gap, 0.5), s.row - sill);
        if (level === 0) this.cross(pen, x, y, s);
      }
    }
    pen.strokeStyle = ink.faint;
    pen.strokeRect(LABEL - 0.5, TOP - 0.5, s.cell * s.experts + 1, s.layers * s.row + 0.5);
  }

  cross(pen, x, y, s) {
    const arm = Math.max(1.5, Math.min(s.cell, s.row) / 4);
    const [cx, cy] = [x + (s.cell - 1) / 2, y + (s.row - 1) / 2];
    pen.strokeStyle = themeOf(this.root) === "dark" ? "#0b1016" : "#ffffff";
    pen.lineWidth = 1.6;
    pen.beginPath();
    pen.moveTo(cx - arm, cy - arm); pen.lineTo(cx + arm, cy + arm);
    pen.moveTo(cx + arm, cy - arm); pen.lineTo(cx - arm, cy + arm);
    pen.stroke();
    pen.lineWidth = 1;
  }

  // Entropy as a filled line per layer, pixel by pixel: the further below its maximum, the more orange.
  past(pen, s, ink, ramp) {
    const ticks = this.data.steps.length;
    const inner = s.row - (s.row > 12 ? 5 : 1), middle = (ramp.length - 1) / 2;
    for (let layer = 0; layer < s.layers; layer++) {
      const floor = TOP + layer * s.row + inner + 2;
      pen.fillStyle = ink.faint;
      if (s.row > 12) pen.fillRect(s.from, floor, s.past, 1);
      for (let x = 0; x < s.past; x++) {
        const value = this.history[Math.floor((x / s.past) * ticks) * s.layers + layer];
        if (value === 255 || value === undefined) continue;
        const entropy = value / 254, bar = Math.max(1, entropy * inner);
        pen.fillStyle = ramp[Math.round(middle * (1 + Math.min(1, (1 - entropy) / LOWEST)))];
        pen.fillRect(s.from + x, floor - bar, 1, bar);
        pen.fillStyle = s.row > 12 ? ink.muted : ink.faint;
        pen.fillRect(s.from + x, floor - bar, 1, 1);
      }
    }
  }

  labels(pen, s, ink) {
    pen.font = `12px ${ink.font}`;
    pen.textBaseline = "middle";
    const every = Math.ceil(13 / s.row);
    const marked = new Set([this.data.layer, ...this.data.alarms.flatMap((alarm, layer) => (alarm ? [layer] : []))]);
    const crowded = (layer) => [...marked].some((at) => at !== null && at !== layer && Math.abs(at - layer) < every);
    for (let layer = 0; layer < s.layers; layer++) {
      const y = TOP + layer * s.row + s.row / 2;
      const alarm = this.data.alarms[layer];
      pen.textAlign = "right";
      if (alarm) {
        pen.fillStyle = alarm.color;
        pen.fillText(alarm.mark, 12, y);
      }
      if (!marked.has(layer) && (layer % every || crowded(layer))) continue;
      pen.fillStyle = layer === this.data.layer ? ink.text : ink.muted;
      pen.fillText(`L${layer}`, LABEL - 8, y);
      pen.textAlign = "left";
      pen.fillText(this.data.entropy[layer], s.now + 10, y);
    }
    pen.fillStyle = ink.muted;
    const base = TOP + s.layers * s.row + AXIS / 2 + 2;
    const stride = [1, 2, 4, 8, 16, 32, 64, 128].find((n) => n * s.cell >= 24) ?? 256;
    pen.textAlign = "center";
    for (let e = 0; e < s.experts; e += stride) pen.fillText(`E${e}`, LABEL + (e + 0.5) * s.cell, base);
    pen.textAlign = "left";
    pen.fillText("H / max", s.now + 10, base);
    if (this.data.steps.length) {
      pen.fillText(`step ${thousands(this.data.steps[0])}`, s.from, base);
      pen.textAlign = "right";
      pen.fillText(thousands(this.data.steps.at(-1)), s.from + s.past, base);
    }
  }

  mark(pen, s, ink) {
    const outline = (layer, expert, color, width) => {
      pen.strokeStyle = color;
      pen.lineWidth = width;
      pen.strokeRect(LABEL + expert * s.cell - 1, TOP + layer * s.row - 1, Math.max(s.cell, 3) + 1, s.row + 1);
      pen.lineWidth = 1;
    };
    const { layer, expert } = this.data;
    if (layer !== null) {
      pen.fillStyle = ink.accent;
      pen.fillRect(LABEL - 4, TOP + layer * s.row, 2, s.row - 1);
      if (expert !== null) outline(layer, expert, ink.accent, 2);
    }
    if (this.cursor) outline(this.cursor.layer, this.cursor.expert, ink.text, 1.5);
  }

  at(event) {
    const s = this.shape();
    const layer = Math.floor((event.offsetY - TOP) / s.row);
    if (layer < 0 || layer >= s.layers) return null;
    const expert = Math.floor((event.offsetX - LABEL) / s.cell);
    if (expert >= 0 && expert < this.data.widths[layer]) return { layer, expert, tick: null };
    const tick = Math.floor(((event.offsetX - s.from) / s.past) * this.data.steps.length);
    return { layer, expert: null, tick: tick >= 0 && tick < this.data.steps.length ? tick : null };
  }

  describe({ layer, expert, tick }) {
    if (expert !== null) {
      const index = layer * this.data.experts + expert;
      const load = this.load[index] * this.data.unit, share = load / this.data.widths[layer];
      return [["strong", `Layer ${layer} · Expert ${expert}`],
        ["", this.level[index] === 0 ? "no token at this step (dead mark ×)" : `${times(load)} the even share`],
        ["muted", `${percent(share)} of assignments · ${times(this.smooth[index] * this.data.unit)} smoothed`]];
    }
    const value = tick === null ? null : this.history[tick * this.data.layers + layer];
    if (value === null || value === 255) return [["strong", `Layer ${layer}`], ["muted", "click to select"]];
    return [["strong", `Layer ${layer} · step ${thousands(this.data.steps[tick])}`],
      ["", `load entropy ${(value / 254).toFixed(3)} of its maximum`]];
  }

  hover(event) {
    const place = this.at(event);
    this.canvas.style.cursor = place ? "pointer" : "default";
    if (place) placeTip(this.tip, this.describe(place), event.clientX, event.clientY);
    else hideTip(this.tip);
  }

  pick(place) {
    if (place) this.select("cell", { layer: place.layer, expert: place.expert });
  }

  key(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const { layers, widths } = this.data;
    if (move) {
      const from = this.cursor ?? { layer: this.data.layer ?? 0, expert: this.data.expert ?? 0 };
      const layer = Math.max(0, Math.min(layers - 1, from.layer + move[0]));
      const expert = Math.max(0, Math.min(widths[layer] - 1, from.expert + move[1]));
      this.cursor = { layer, expert };
      this.voice.textContent = this.describe({ layer, expert, tick: null }).map((line) => line[1]).join(", ");
    } else if (event.key === "Enter" && this.cursor) this.pick(this.cursor);
    else if (event.key === "Escape") this.cursor = null;
    else return;
    event.preventDefault();
    this.draw();
  }

  legend() {
    const bar = this.root.querySelector(".ramp");
    const pen = fit(bar, 220, 24);
    const ink = inkOf(this.root), theme = themeOf(this.root), ramp = rampOf(`load_${theme}`);
    if (!ink.text) return;
    for (let x = 0; x < 220; x++) {
      pen.fillStyle = ramp[Math.round((x / 219) * (ramp.length - 1))];
      pen.fillRect(x, 0, 1, 9);
    }
    pen.strokeStyle = ink.faint;
    pen.strokeRect(0.5, 0.5, 219, 8.5);
    pen.fillStyle = ink.muted;
    pen.font = `11px ${ink.font}`;
    this.data.ticks.forEach(([z, text]) => {
      const x = ((z + 3) / 6) * 220;
      pen.textAlign = z === -3 ? "left" : z === 3 ? "right" : "center";
      pen.fillText(text, x, 21);
    });
    this.root.querySelector(".noise").textContent = this.data.noise;
  }
}

export default mount(LoadMap);
