// Shared by every canvas component: decode what Python packed, find the theme, size a canvas, number formats.
// TABLES and HUES (the colours of moeviz.colors) are put in front of this file when a component is registered.

const decode = (base64, Type = Uint8Array) => {
  const raw = atob(base64 ?? "");
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Type(bytes.buffer);
};

const cssVariable = (root, name) => getComputedStyle(root.host ?? root).getPropertyValue(name).trim();

// The page tells its theme by its background: dark when it is darker than mid-grey.
const themeOf = (root) => {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  probe.fillStyle = cssVariable(root, "--st-background-color") || "#ffffff";
  probe.fillRect(0, 0, 1, 1);
  const [red, green, blue] = probe.getImageData(0, 0, 1, 1).data;
  return 0.299 * red + 0.587 * green + 0.114 * blue < 128 ? "dark" : "light";
};

const tables = {};
const rampOf = (name) => {
  if (!tables[name]) {
    const bytes = decode(TABLES[name]);
    tables[name] = Array.from({ length: bytes.length / 3 }, (_, i) =>
      `rgb(${bytes[3 * i]},${bytes[3 * i + 1]},${bytes[3 * i + 2]})`);
  }
  return tables[name];
};

const inkOf = (root) => ({
  text: cssVariable(root, "--st-text-color"),
  muted: `color-mix(in srgb, ${cssVariable(root, "--st-text-color")} 62%, transparent)`,
  faint: `color-mix(in srgb, ${cssVariable(root, "--st-text-color")} 14%, transparent)`,
  card: cssVariable(root, "--st-secondary-background-color"),
  accent: cssVariable(root, "--st-primary-color"),
  font: cssVariable(root, "--st-font") || "sans-serif",
  mono: cssVariable(root, "--st-code-font") || "monospace",
});

const fit = (canvas, width, height) => {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
};

const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

const thousands = (value) => Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
const times = (value) => `${value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)}×`;
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 2 : 1)} %`;

// One floating note per component, kept inside the window.
const placeTip = (tip, lines, x, y) => {
  tip.replaceChildren(...lines.map(([className, text]) => make("div", className, text)));
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  const left = x + 14 + box.width > window.innerWidth ? x - box.width - 14 : x + 14;
  const top = Math.min(y + 14, window.innerHeight - box.height - 6);
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
};
const hideTip = (tip) => { tip.style.display = "none"; };

// Keep one view object per mounted element: Streamlit calls the default export again for every change of data.
const mount = (View) => {
  const views = new WeakMap();
  return (component) => {
    const root = component.parentElement;
    let view = views.get(root);
    if (!view) {
      view = new View(root, component);
      views.set(root, view);
      view.observer = new ResizeObserver(() => view.draw());
      view.observer.observe(root.querySelector(".frame"));
    }
    view.update(component);
    return () => {
      view.observer.disconnect();
      view.stop?.();
      views.delete(root);
    };
  };
};
