// The state of the run in words, and six numbers with their recent past. Nodes are made once and written in place.

const SVG = "http://www.w3.org/2000/svg";

class Header {
  constructor(root) {
    this.root = root;
    this.find = (selector) => root.querySelector(selector);
    this.tiles = [];
  }

  update({ data }) {
    this.find(".name").textContent = data.name;
    const state = this.find(".state");
    state.dataset.state = data.state;
    state.querySelector("b").textContent = data.word;
    state.querySelector("span").textContent = data.behind;
    this.find(".alarms").replaceChildren(...data.alarms.map(({ severity, text }) => make("span", severity, text)));
    this.find(".facts").replaceChildren(...data.facts.flatMap(([before, value, after], i) =>
      [(i ? "\u2002·\u2002" : "") + before, make("b", "", value), after]));
    const progress = this.find(".progress");
    progress.firstElementChild.style.width = `${100 * data.progress}%`;
    progress.setAttribute("aria-label", data.planned);
    progress.title = data.planned;
    progress.setAttribute("aria-valuenow", Math.round(100 * data.progress));
    data.tiles.forEach((tile, i) => this.tile(i, tile));
    this.draw();
  }

  tile(index, { label, value, detail, help, tone, spark, limits }) {
    const nodes = (this.tiles[index] ??= this.build());
    nodes.box.dataset.tone = tone;
    nodes.box.title = help;
    nodes.label.textContent = label;
    nodes.value.textContent = value;
    nodes.detail.textContent = detail;
    Object.assign(nodes, { spark, limits });
  }

  build() {
    const box = make("div", "tile");
    const [label, value, detail] = ["label", "value", "detail"].map((name) => make("div", name));
    const svg = document.createElementNS(SVG, "svg");
    const [path, dot] = ["path", "circle"].map((name) => document.createElementNS(SVG, name));
    svg.setAttribute("aria-hidden", "true");
    dot.setAttribute("r", 2.4);
    svg.append(path, dot);
    box.append(label, svg, value, detail);
    this.find(".tiles").append(box);
    return { box, label, value, detail, svg, path, dot };
  }

  line({ svg, path, dot, box, spark: values, limits: [low, high] }) {
    svg.style.display = values.length > 1 ? "block" : "none";
    if (values.length < 2) return;
    const [width, height] = [box.clientWidth * 0.4, 22];
    const span = high - low || 1;
    const points = values.map((v, i) => [(i / (values.length - 1)) * width, height - ((v - low) / span) * height]);
    path.setAttribute("d", points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join(""));
    dot.setAttribute("cx", points.at(-1)[0]);
    dot.setAttribute("cy", points.at(-1)[1]);
  }

  // Lines are drawn when all tiles stand, because each one's width depends on the others.
  draw() {
    this.tiles.forEach((nodes) => this.line(nodes));
  }
}

export default mount(Header);
