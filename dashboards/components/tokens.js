// A routed sequence as text. Spans are made once and recoloured in place: moving through the layers never asks the
// server. Hues belong to ranks of use within a layer, because expert 3 of one layer has nothing to do with expert 3
// of the next. Token text is untrusted and only ever becomes textContent.

const GREY = "#8b8f96", CHOSEN = "#E69F00";
const MODES = [["expert", "Expert"], ["weight", "Gate weight"], ["loss", "Loss"]];
const ROW_LABEL = 46;

class Tokens {
  constructor(root) {
    this.root = root;
    this.find = (selector) => root.querySelector(selector);
    this.mode = "expert";
    this.cursor = null;
    this.tip = this.find(".tip");
    this.text = this.find(".text");
    this.ribbon = this.find(".ribbon");
    this.find(".modes").append(...MODES.map(([mode, label]) => this.modeButton(mode, label)));
    this.find(".play").onclick = () => this.play();
    const dial = this.find(".layer");
    dial.oninput = () => this.go(Number(dial.value));
    dial.onchange = () => this.tell();
    this.text.onmousemove = (event) => this.point(event.target.dataset?.at, event.clientX, event.clientY);
    this.text.onmouseleave = this.ribbon.onmouseleave = () => this.point();
    this.text.onkeydown = (event) => this.key(event);
    this.ribbon.onmousemove = (event) => this.over(event);
    this.ribbon.onclick = (event) => { this.go(this.rowOf(event)); this.tell(); };
  }

  update({ data, setStateValue }) {
    this.send = setStateValue;
    const fresh = data.id !== this.data?.id;
    this.data = data;
    this.experts = new Uint16Array(decode(data.experts).buffer);
    this.weights = decode(data.weights);
    this.loss = decode(data.loss, Float32Array);
    if (fresh) this.build();
    if (data.layer !== this.told?.layer || data.expert !== this.told?.expert || fresh) {
      this.layer = Math.min(data.layer, data.layers - 1);
      this.expert = data.expert;
    }
    this.told = { layer: data.layer, expert: data.expert };
    this.find(".layer").max = data.layers - 1;
    this.find(".caption").textContent = data.ribbon;
    this.text.setAttribute("aria-label", data.alt);
    this.draw();
  }

  build() {
    this.spans = this.data.texts.map((text, at) => {
      const span = make("span", text.includes("\n") ? "break" : "", text);
      span.dataset.at = at;
      return span;
    });
    this.text.replaceChildren(...this.spans);
    this.text.scrollTop = 0;
    this.cursor = null;
  }

  // Expert of `slot` at token `at` of `layer`.
  id(layer, at, slot) { return this.experts[(layer * this.data.tokens + at) * this.data.k + slot]; }
  share(layer, at, slot) { return this.weights[(layer * this.data.tokens + at) * this.data.k + slot] / 255; }

  // Slot that holds the filtered expert at a token, or -1.
  slotOf(at) {
    for (let slot = 0; slot < this.data.k; slot++) if (this.id(this.layer, at, slot) === this.expert) return slot;
    return -1;
  }

  // Experts of a layer by falling use as first choice, with hues for the first seven.
  ranking(layer) {
    const uses = new Map();
    for (let at = 0; at < this.data.tokens; at++) {
      const id = this.id(layer, at, 0);
      uses.set(id, (uses.get(id) ?? 0) + 1);
    }
    const ranked = [...uses].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    const hues = new Map();
    const chosen = layer === this.layer ? this.expert : null;
    const free = HUES.filter((hue) => chosen === null || hue !== CHOSEN);
    if (chosen !== null) hues.set(chosen, CHOSEN);
    for (const [id] of ranked) if (!hues.has(id) && free.length) hues.set(id, free.shift());
    return { ranked, hues };
  }

  // [colour, strength 0 to 1] of a token, by mode and filter.
  paint(layer, at, hues) {
    if (this.mode === "loss") {
      const loss = this.loss[at];
      return Number.isNaN(loss) ? [GREY, 0.1] : [this.tone(loss / this.data.loss_max), 0.6];
    }
    if (this.expert !== null) {
      const slot = this.slotOf(at);
      if (slot < 0) return [GREY, 0];
      if (layer === this.layer) return [CHOSEN, 0.25 + 0.6 * this.share(layer, at, slot)];
    }
    if (this.mode === "weight") return [this.tone(this.share(layer, at, 0)), 0.6];
    const hue = hues.get(this.id(layer, at, 0));
    return [hue ?? GREY, hue ? 0.36 : 0.16];
  }

  tone(unit) {
    const ramp = rampOf("sequential");
    return ramp[Math.round(Math.max(0, Math.min(1, unit)) * (ramp.length - 1))];
  }

  draw() {
    if (!this.data) return;
    const { ranked, hues } = this.ranking(this.layer);
    this.spans.forEach((span, at) => {
      const [color, strength] = this.paint(this.layer, at, hues);
      span.style.backgroundColor = `color-mix(in srgb, ${color} ${Math.round(100 * strength)}%, transparent)`;
      span.style.borderBottomColor = strength > 0.2 && this.mode === "expert" ? color : "transparent";
      span.classList.toggle("off", this.mode !== "loss" && this.expert !== null && strength === 0);
    });
    this.find(".where").textContent = `Layer ${this.layer}`;
    this.find(".layer").value = this.layer;
    this.find(".play").textContent = this.timer ? "❚❚ Pause" : "▶ Play";
    for (const button of this.find(".modes").children)
      button.setAttribute("aria-checked", button.dataset.mode === this.mode);
    this.keys(ranked, hues);
    this.strip();
  }

  keys(ranked, hues) {
    if (this.mode === "loss" || (this.mode === "weight" && this.expert === null)) return this.scale();
    const total = this.data.tokens;
    const shown = ranked.filter(([id]) => hues.has(id));
    if (this.expert !== null && !shown.some(([id]) => id === this.expert)) shown.unshift([this.expert, 0]);
    const rest = ranked.length - shown.filter(([, uses]) => uses).length;
    const chips = shown.map(([id, uses]) => {
      const chip = make("button");
      chip.type = "button";
      const swatch = make("i");
      swatch.style.background = hues.get(id);
      chip.append(swatch, `E${id}`, make("span", "", percent(uses / total)));
      chip.setAttribute("aria-pressed", id === this.expert);
      chip.title = "first choice of this share of the tokens; press to see only this expert";
      chip.onclick = () => { this.expert = id === this.expert ? null : id; this.draw(); this.tell(); };
      return chip;
    });
    if (rest > 0) chips.push(make("span", "muted", `and ${rest} more in grey`));
    this.find(".keys").replaceChildren(...chips);
  }

  scale() {
    const [low, high] = this.mode === "loss" ? ["0 nats", `${this.data.loss_max.toFixed(1)} nats`] : ["0", "1"];
    const bar = make("canvas", "ramp");
    const pen = fit(bar, 180, 10);
    for (let x = 0; x < 180; x++) { pen.fillStyle = this.tone(x / 179); pen.fillRect(x, 0, 1, 10); }
    const what = this.mode === "loss" ? "loss of predicting the next token" : "gate weight of the first choice";
    this.find(".keys").replaceChildren(make("span", "muted", low), bar, make("span", "muted", `${high}   ${what}`));
  }

  strip() {
    const { layers, tokens } = this.data;
    const width = this.find(".frame").clientWidth;
    const row = Math.max(5, Math.min(18, Math.floor(300 / layers))), step = (width - ROW_LABEL) / tokens;
    this.grid = { row, step };
    const pen = fit(this.ribbon, width, layers * row + 4), ink = inkOf(this.root);
    const every = Math.ceil(12 / row);
    pen.font = `11px ${ink.font}`;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (let layer = 0; layer < layers; layer++) {
      const { hues } = this.ranking(layer);
      for (let at = 0; at < tokens; at++) {
        const [color, strength] = this.paint(layer, at, hues);
        pen.globalAlpha = strength > 0.2 ? Math.min(1, strength + 0.45) : strength;
        pen.fillStyle = color;
        pen.fillRect(ROW_LABEL + at * step, 2 + layer * row, Math.max(step - (step > 5 ? 1 : 0), 0.6), row - 1);
      }
      pen.globalAlpha = 1;
      pen.fillStyle = layer === this.layer ? ink.text : ink.muted;
      if (layer % every === 0 || layer === this.layer) pen.fillText(`L${layer}`, ROW_LABEL - 9, 2 + (layer + 0.5) * row);
    }
    pen.fillStyle = ink.accent;
    pen.fillRect(ROW_LABEL - 5, 2 + this.layer * row, 2, row - 1);
    if (this.cursor !== null) {
      pen.strokeStyle = ink.text;
      pen.strokeRect(ROW_LABEL + this.cursor * step - 0.5, 0.5, Math.max(step, 2) + 0.5, layers * row + 3);
    }
  }

  rowOf(event) {
    return Math.max(0, Math.min(this.data.layers - 1, Math.floor((event.offsetY - 2) / this.grid.row)));
  }

  over(event) {
    const at = Math.floor((event.offsetX - ROW_LABEL) / this.grid.step);
    this.ribbon.style.cursor = "pointer";
    if (at < 0 || at >= this.data.tokens) return this.point();
    this.point(at, event.clientX, event.clientY, this.rowOf(event));
  }

  point(at, x, y, layer = this.layer) {
    const next = at === undefined ? null : Number(at);
    if (next !== this.cursor) {
      this.spans[this.cursor]?.classList.remove("on");
      this.spans[next]?.classList.add("on");
      this.cursor = next;
      this.strip();
    }
    if (next === null) return hideTip(this.tip);
    placeTip(this.tip, this.describe(next, layer), x, y);
  }

  describe(at, layer) {
    const shown = this.data.texts[at].replaceAll("\n", "↵").replaceAll(" ", "·");
    const lines = [["strong", `${shown}   layer ${layer}`]];
    for (let slot = 0; slot < this.data.k; slot++)
      lines.push(["", `E${this.id(layer, at, slot)}   weight ${this.share(layer, at, slot).toFixed(2)}`]);
    const loss = this.loss[at];
    lines.push(["muted", `position ${at} · id ${this.data.ids[at]}` +
      (Number.isNaN(loss) ? "" : ` · next-token loss ${loss.toFixed(2)}`)]);
    return lines;
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const turn = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (turn) { this.go(this.layer + turn); this.tell(); }
    else if (event.key === "Escape") { this.expert = null; this.point(); this.draw(); this.tell(); }
    else if (!move) return;
    const at = Math.max(0, Math.min(this.data.tokens - 1, (this.cursor ?? -1) + (move ?? 0)));
    if (move || (turn && this.cursor !== null)) {
      const box = this.spans[at].getBoundingClientRect();
      this.point(at, box.left, box.bottom);
      this.find(".quiet").textContent = this.describe(at, this.layer).map((line) => line[1]).join(", ");
    }
    event.preventDefault();
  }

  go(layer) {
    this.layer = Math.max(0, Math.min(this.data.layers - 1, layer));
    this.draw();
  }

  // One message when the hand lets go, so that the link of the page names this layer.
  tell() {
    this.told = { layer: this.layer, expert: this.expert };
    this.send("place", this.told);
  }

  play() {
    if (this.timer) {
      this.stop();
      this.tell();
    } else this.timer = setInterval(() => this.go((this.layer + 1) % this.data.layers), 700);
    this.draw();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }

  modeButton(mode, label) {
    const button = make("button", "", label);
    button.type = "button";
    button.dataset.mode = mode;
    button.setAttribute("role", "radio");
    button.onclick = () => { this.mode = mode; this.draw(); };
    return button;
  }
}

export default mount(Tokens);
