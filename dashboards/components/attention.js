// One attention map, and the text as the query under the pointer reads it. Weights come as bytes on a square-root
// scale, the same for every head: small weights stay visible beside a sink, and colours can be compared.

const TOP = 4, LONGEST = 11, LETTER = 6.4;

class Attention {
  constructor(root) {
    this.root = root;
    this.find = (selector) => root.querySelector(selector);
    this.map = this.find(".map");
    this.tip = this.find(".tip");
    this.map.onmousemove = (event) => this.over(event);
    this.map.onmouseleave = () => { this.cell = null; hideTip(this.tip); this.show(this.pinned); };
    this.map.onclick = () => { if (this.cell) this.pinned = this.cell.query; };
    this.map.onkeydown = (event) => this.key(event);
    this.find(".text").onmouseover = (event) => this.show(Number(event.target.dataset?.at ?? this.pinned));
    this.find(".text").onmouseleave = () => this.show(this.pinned);
    this.find(".text").onclick = (event) => { this.pinned = Number(event.target.dataset?.at ?? this.pinned); };
  }

  update({ data }) {
    const fresh = data.id !== this.data?.id;
    this.data = data;
    this.codes = decode(data.map);
    this.cell = null;
    if (fresh || this.pinned === undefined) this.pinned = Math.floor(0.72 * (data.rows - 1));
    this.pinned = Math.min(this.pinned, data.rows - 1);
    this.spans = data.texts.map((text, at) => {
      const span = make("span", text.includes("\n") ? "break" : "", text);
      span.dataset.at = at;
      return span;
    });
    this.find(".text").replaceChildren(...this.spans);
    this.find(".text").style.display = this.spans.length ? "block" : "none";
    this.find(".hatch").textContent = data.causal ? "hatched: later tokens, which a causal model cannot read" : "";
    this.map.setAttribute("aria-label", data.alt);
    this.draw();
  }

  weight(query, key) { return (this.codes[query * this.data.cols + key] / 254) ** 2; }
  tone(weight) {
    const ramp = rampOf("sequential");
    return ramp[Math.round(Math.sqrt(Math.max(0, Math.min(1, weight))) * (ramp.length - 1))];
  }

  draw() {
    if (!this.data) return;
    const { rows, cols, causal } = this.data;
    const width = this.find(".frame").clientWidth;
    const beside = width > 700 ? 284 : 0;  // room for the text and its gap
    const names = this.data.texts.map((_, at) => this.name(at).length);
    const margin = 16 + LETTER * Math.min(LONGEST, Math.max(3, ...names));  // room for the labels
    const side = Math.max(220, Math.min(600, width - margin - 6 - beside));
    this.find(".left").style.width = `${margin + side + 4}px`;
    this.size = { side, margin, row: side / rows, col: side / cols };
    const pen = fit(this.map, margin + side + 4, TOP + side + margin);
    const ink = inkOf(this.root);
    if (causal) this.hatch(pen, ink);
    for (let query = 0; query < rows; query++)
      for (let key = 0; key < (causal ? query + 1 : cols); key++) {
        pen.fillStyle = this.tone(this.weight(query, key));
        pen.fillRect(this.size.margin + key * this.size.col, TOP + query * this.size.row, this.size.col + 0.7, this.size.row + 0.7);
      }
    pen.strokeStyle = ink.faint;
    pen.strokeRect(this.size.margin - 0.5, TOP - 0.5, side + 1, side + 1);
    this.labels(pen, ink);
    this.legend(ink);
    this.image = pen.getImageData(0, 0, this.map.width, this.map.height);
    this.show(this.pinned);
  }

  hatch(pen, ink) {
    const { side } = this.size;
    pen.save();
    pen.beginPath();
    pen.moveTo(this.size.margin, TOP); pen.lineTo(this.size.margin + side, TOP); pen.lineTo(this.size.margin + side, TOP + side); pen.closePath();
    pen.clip();
    pen.strokeStyle = ink.faint;
    pen.beginPath();
    for (let x = -side; x < side; x += 7) { pen.moveTo(this.size.margin + x, TOP + side); pen.lineTo(this.size.margin + x + side, TOP); }
    pen.stroke();
    pen.restore();
  }

  name(at) {
    const text = this.data.texts[at];
    if (text === undefined) return String(at * this.data.block);
    return text.trim() ? text.replaceAll("\n", "↵") : text.replaceAll("\n", "↵").replaceAll(" ", "·");
  }

  labels(pen, ink) {
    const { rows, cols } = this.data;
    pen.font = `10.5px ${ink.mono}`;
    pen.fillStyle = ink.muted;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const strideRow = Math.ceil(11 / this.size.row), strideCol = Math.ceil(11 / this.size.col);
    const short = (at) => { const name = this.name(at); return name.length > LONGEST ? `${name.slice(0, LONGEST - 1)}…` : name; };
    for (let at = 0; at < rows; at += strideRow) pen.fillText(short(at), this.size.margin - 6, TOP + (at + 0.5) * this.size.row);
    for (let at = 0; at < cols; at += strideCol) {
      pen.save();
      pen.translate(this.size.margin + (at + 0.5) * this.size.col, TOP + this.size.side + 6);
      pen.rotate(-Math.PI / 2);
      pen.fillText(short(at), 0, 0);
      pen.restore();
    }
  }

  // The row of one query: a line in the map, and its weights as shades of the text.
  show(query) {
    if (this.image === undefined) return;
    const pen = this.map.getContext("2d");
    const ink = inkOf(this.root);
    pen.putImageData(this.image, 0, 0);
    pen.strokeStyle = ink.text;
    pen.strokeRect(this.size.margin - 1, TOP + query * this.size.row - 0.5, this.size.side + 2, Math.max(this.size.row, 2) + 1);
    this.spans.forEach((span, at) => {
      const share = at <= query || !this.data.causal ? Math.sqrt(this.weight(query, at)) : 0;
      span.style.backgroundColor = `color-mix(in srgb, var(--st-primary-color) ${Math.round(88 * share)}%, transparent)`;
      span.classList.toggle("future", this.data.causal && at > query);
      span.classList.toggle("query", at === query);
    });
    this.find(".who").textContent = this.spans.length
      ? `“${this.name(query).trim()}” reads` : `Query ${query * this.data.block} reads`;
    this.best(query);
  }

  best(query) {
    const limit = this.data.causal ? query + 1 : this.data.cols;
    const order = [...Array(limit).keys()].sort((a, b) => this.weight(query, b) - this.weight(query, a)).slice(0, 6);
    this.find(".top").replaceChildren(...order.flatMap((key) => {
      const bar = make("i");
      bar.style.width = `${100 * this.weight(query, key)}%`;
      return [make("code", "", this.name(key).trim()), bar, make("span", "muted", this.weight(query, key).toFixed(2))];
    }));
  }

  over(event) {
    const query = Math.floor((event.offsetY - TOP) / this.size.row);
    const key = Math.floor((event.offsetX - this.size.margin) / this.size.col);
    const { rows, cols, causal } = this.data;
    if (query < 0 || query >= rows || key < 0 || key >= cols) { this.cell = null; return hideTip(this.tip); }
    this.cell = { query, key };
    this.show(query);
    const reads = causal && key > query ? "cannot read what comes later" : `weight ${this.weight(query, key).toFixed(3)}`;
    placeTip(this.tip, [["strong", `${this.name(query).trim()} → ${this.name(key).trim()}`], ["", reads],
      ["muted", `query ${query}, key ${key}`]], event.clientX, event.clientY);
  }

  key(event) {
    const move = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!move) return;
    this.pinned = Math.max(0, Math.min(this.data.rows - 1, this.pinned + move));
    this.show(this.pinned);
    this.find(".quiet").textContent = this.find(".who").textContent + " " +
      [...this.find(".top").children].map((node) => node.textContent).filter(Boolean).join(" ");
    event.preventDefault();
  }

  legend(ink) {
    const pen = fit(this.find(".ramp"), 200, 24);
    for (let x = 0; x < 200; x++) { pen.fillStyle = this.tone((x / 199) ** 2); pen.fillRect(x, 0, 1, 9); }
    pen.fillStyle = ink.muted;
    pen.font = `11px ${ink.font}`;
    for (const [weight, text, align] of [[0, "0", "left"], [0.05, ".05", "center"], [0.25, "¼", "center"],
      [0.5, "½", "center"], [1, "1", "right"]]) {
      pen.textAlign = align;
      pen.fillText(text, Math.sqrt(weight) * 200, 21);
    }
  }
}

export default mount(Attention);
