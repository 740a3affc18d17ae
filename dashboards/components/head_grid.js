// Small maps of every recorded head, one row per layer: what is alike and what is odd shows before any detail does.

const MARGIN = 34, HEAD = 20, SPACE = 5;

class HeadGrid {
  constructor(root) {
    this.canvas = root.querySelector("canvas");
    this.root = root;
    this.tip = root.querySelector(".tip");
    this.voice = root.querySelector(".quiet");
    this.canvas.onmousemove = (event) => this.hover(event);
    this.canvas.onmouseleave = () => hideTip(this.tip);
    this.canvas.onclick = (event) => this.pick(this.at(event));
    this.canvas.onkeydown = (event) => this.key(event);
  }

  update({ data, setStateValue }) {
    this.send = setStateValue;
    this.data = data;
    this.codes = decode(data.thumbs);
    this.cursor = { row: data.layers.indexOf(data.layer), col: data.heads.indexOf(data.head) };
    this.canvas.setAttribute("aria-label", data.alt);
    this.draw();
  }

  pitch() {
    const width = this.root.querySelector(".frame").clientWidth;
    return Math.max(26, Math.min(104, (width - MARGIN) / this.data.heads.length));
  }

  draw() {
    if (!this.data) return;
    const { layers, heads, size, layer, head } = this.data;
    const pitch = this.pitch(), edge = pitch - SPACE, ramp = rampOf("sequential"), ink = inkOf(this.root);
    const pen = fit(this.canvas, MARGIN + pitch * heads.length, HEAD + pitch * layers.length);
    pen.font = `12px ${ink.font}`;
    pen.textBaseline = "middle";
    layers.forEach((name, row) => heads.forEach((number, col) => {
      const [x, y] = [MARGIN + col * pitch, HEAD + row * pitch];
      const start = (row * heads.length + col) * size * size, cell = edge / size;
      for (let q = 0; q < size; q++)
        for (let k = 0; k < size; k++) {
          const code = this.codes[start + q * size + k];
          if (code === 255) continue;
          pen.fillStyle = ramp[code];
          pen.fillRect(x + k * cell, y + q * cell, cell + 0.7, cell + 0.7);
        }
      const chosen = name === layer && number === head;
      pen.strokeStyle = chosen ? ink.accent : ink.faint;
      pen.lineWidth = chosen ? 2 : 1;
      pen.strokeRect(x - 1, y - 1, edge + 2, edge + 2);
    }));
    pen.fillStyle = ink.muted;
    pen.textAlign = "right";
    layers.forEach((name, row) => pen.fillText(`B${name}`, MARGIN - 9, HEAD + row * pitch + edge / 2));
    pen.textAlign = "center";
    heads.forEach((number, col) => pen.fillText(`head ${number}`, MARGIN + col * pitch + edge / 2, HEAD / 2 - 1));
  }

  at(event) {
    const pitch = this.pitch();
    const row = Math.floor((event.offsetY - HEAD) / pitch), col = Math.floor((event.offsetX - MARGIN) / pitch);
    return row >= 0 && col >= 0 && row < this.data.layers.length && col < this.data.heads.length ? { row, col } : null;
  }

  describe({ row, col }) {
    const facts = this.data.facts[row * this.data.heads.length + col];
    return [["strong", `Block ${this.data.layers[row]} · head ${this.data.heads[col]}`], ...facts.map((fact) => ["", fact])];
  }

  hover(event) {
    const place = this.at(event);
    this.canvas.style.cursor = place ? "pointer" : "default";
    if (place) placeTip(this.tip, this.describe(place), event.clientX, event.clientY);
    else hideTip(this.tip);
  }

  pick(place) {
    if (place) this.send("head", { layer: this.data.layers[place.row], head: this.data.heads[place.col] });
  }

  key(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Enter") return this.pick(this.cursor);
    if (!move) return;
    const { layers, heads } = this.data;
    this.cursor = { row: Math.max(0, Math.min(layers.length - 1, this.cursor.row + move[0])),
      col: Math.max(0, Math.min(heads.length - 1, this.cursor.col + move[1])) };
    this.voice.textContent = this.describe(this.cursor).map((line) => line[1]).join(", ") + ", Enter to open";
    event.preventDefault();
  }
}

export default mount(HeadGrid);
