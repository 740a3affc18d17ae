// Alert episodes, worst first: severity in words and shapes, where, since when, what it means and what to do.

class Alerts {
  constructor(root) {
    this.root = root;
    this.shown = null;
  }

  update({ data, setStateValue }) {
    this.select = setStateValue;
    const text = JSON.stringify(data);
    if (text === this.shown) return;
    this.shown = text;
    const rows = (alerts) => alerts.map((alert) => this.row(alert));
    this.root.querySelector(".open").replaceChildren(
      ...(data.open.length ? rows(data.open) : [make("div", "calm", data.calm)]));
    this.root.querySelector(".closed").replaceChildren(...rows(data.cleared));
    const past = this.root.querySelector(".past");
    past.style.display = data.cleared.length ? "block" : "none";
    past.querySelector("summary").textContent = `Cleared (${data.cleared.length})`;
  }

  row(alert) {
    const box = make("div", "alert");
    box.dataset.severity = alert.severity;
    box.setAttribute("role", "listitem");
    const severity = make("div", "severity");
    severity.append(make("i", "", alert.mark), alert.word);
    const where = make("div", "where", alert.where);
    where.append(make("span", "rule", alert.rule));
    box.append(severity, where, make("div", "when", alert.when), make("div", "message", alert.message),
      make("div", "remedy", alert.remedy));
    if (alert.layer !== null) {
      box.tabIndex = 0;
      const go = () => this.select("cell", { layer: alert.layer, expert: alert.expert });
      box.onclick = go;
      box.onkeydown = (event) => { if (event.key === "Enter") go(); };
    } else box.style.cursor = "default";
    return box;
  }

  draw() {}
}

export default mount(Alerts);
