// Draws the charts that charts.py describes. All values are data of Vega: names never become markup.

const DATA = JSON.parse(document.getElementById("data").textContent);

/** Writes a number in the largest step of its unit that is not above it. steps: [factor, suffix], ascending. */
function format(value, steps) {
  if (value === null || value === undefined) return "";
  const [factor, suffix] = steps.findLast(([factor]) => value >= factor * (1 - 1e-9)) ?? steps[0];
  return `${Number((value / factor).toPrecision(4))}${suffix}`;
}

/** The same as an expression of Vega, for the labels of an axis. */
function labelExpression(steps) {
  const texts = steps.map(([factor, suffix]) => `format(datum.value / ${factor}, '~r') + ${JSON.stringify(suffix)}`);
  return texts.reduce((smaller, text, index) => `datum.value >= ${steps[index][0] * (1 - 1e-9)} ? ${text} : ${smaller}`);
}

/** A setting as format_setting of Python writes it: 8192 is 8k. */
function formatSetting(value) {
  if (typeof value !== "number") return String(value);
  for (const [size, unit] of [[2 ** 20, "M"], [2 ** 10, "k"]]) {
    if (value >= size && value % 512 === 0) return `${Number((value / size).toPrecision(6))}${unit}`;
  }
  return String(Number(value.toPrecision(6)));
}

/** The points of a chart: its rows, each with the text of its tooltip. */
function makePoints(chart, part, rows) {
  const failures = new Map();
  const drawn = rows.filter((row) => {
    if (row.outcome !== "ok") return true;
    const fits = Object.entries(chart.only ?? {}).every(([column, value]) => (row[column] ?? null) === value);
    return fits && (!chart.same || row[chart.same[0]] === row[chart.same[1]]) && row[chart.y] !== null;
  });
  return drawn.map((row) => {
    const ok = row.outcome === "ok";
    const point = { attention: row.attention, set: row.set, series: `${row.attention}\n${row.set}`, settings: row.settings, ok, x: row[chart.x] };
    const tip = { attention: row.attention, at: chart.xPhrase.replace("{}", formatSetting(row[chart.x])) };
    if (part.sets.length > 1) tip.set = row.set;
    if (ok) {
      Object.assign(point, { y: row[chart.y], low: row[chart.low] ?? null, high: row[chart.high] ?? null });
      tip.value = format(point.y, chart.unit);
      if (point.low !== null && point.high !== null) tip["95 % interval"] = `${format(point.low, chart.unit)} to ${format(point.high, chart.unit)}`;
      for (const { column, name, unit } of DATA.details) {
        const value = row[column];
        if (value === null || value === undefined || value === "") continue;
        tip[name] = unit ? format(value, unit) : String(typeof value === "number" ? Number(value.toPrecision(4)) : value);
      }
    } else {
      // Marks of several failures at one x stand one above another.
      const slot = failures.get(row[chart.x]) ?? 0;
      failures.set(row[chart.x], slot + 1);
      Object.assign(point, { slot: 8 + 14 * slot, outcome: row.outcome });
      Object.assign(tip, { outcome: row.outcome, reason: row.detail || "not given" });
    }
    point.tip = tip;
    point.label = Object.entries(tip).map(([key, value]) => `${key} ${value}`).join(", ");
    return point;
  });
}

const SETTING_LABEL = "datum.value >= 1048576 && datum.value % 524288 == 0 ? format(datum.value / 1048576, '~g') + 'M' : " +
  "datum.value >= 1024 && datum.value % 512 == 0 ? format(datum.value / 1024, '~g') + 'k' : format(datum.value, '~g')";
const INK = "var(--ink)", FAINT = "var(--rule)";
const MANY = 800; // with more points, intervals become bands, and only some points have a mark
const MAX_CORNERS = 120; // of a line or band: a chart is at least 350 pixels wide
const MAX_MARKS = 240; // of many points: each mark is an element of the page

/** Ticks of a logarithmic axis: 1, 2 and 5 in each decade, or only the decades if there are many. */
function decades(lowest, highest) {
  const steps = highest / lowest > 300 ? [1] : [1, 2, 5];
  const powers = Array.from({ length: 40 }, (_, index) => index - 20).filter((power) => 10 ** (power + 1) > lowest / 2 && 10 ** power < 2 * highest);
  return powers.flatMap((power) => steps.map((step) => Number(`${step}e${power}`)));
}

/** The points that each layer draws. They are filtered here, because Vega's own filter is slow for many points. */
function datasets(values, { attentions, sets, settings }) {
  const chosen = values.filter((point) => attentions.includes(point.attention) && sets.includes(point.set) && point.settings === settings);
  const ok = chosen.filter((point) => point.ok);
  const lines = ok.filter((point) => point.lined);
  return { lines, ranges: lines.filter((point) => point.low !== null), points: ok.filter((point) => point.marked), failures: chosen.filter((point) => !point.ok) };
}

/** The Vega-Lite specification of a chart. Colours are CSS variables, so that light, dark and print need no second drawing. */
function specification(chart, part, values, { logX, logY, ...choice }) {
  const ok = values.filter((point) => point.ok);
  const names = part.attentions;
  const styles = names.map((name) => part.styles[name]);
  const single = new Set(values.map((point) => point.x)).size === 1;
  const positions = [...new Set(values.map((point) => point.x))].sort((a, b) => (typeof a === "number" ? a - b : 0));
  const by = (range) => ({ field: "attention", type: "nominal", legend: null, scale: { domain: names, range } });
  const colour = by(names.map((_, index) => `var(--s${part.index}-${index})`));
  const opacity = { field: "set", type: "ordinal", sort: part.sets, legend: null, scale: { domain: part.sets, range: part.sets.map((_, index) => (part.sets.length === 1 ? 1 : 0.6 + (0.4 * index) / (part.sets.length - 1))) } };
  const x = chart.ordered
    ? { field: "x", type: "quantitative", title: chart.xTitle, scale: { type: logX ? "log" : "linear", ...(logX ? { base: 2 } : { zero: false }), nice: false, padding: 12 }, axis: { labelExpr: SETTING_LABEL, labelOverlap: true, grid: false, ...(positions.length <= 16 ? { values: positions } : {}) } }
    : { field: single ? "attention" : "x", type: "nominal", sort: single ? names : positions, title: single ? null : chart.xTitle, axis: { labelAngle: single ? -30 : 0, grid: false } };
  const offset = chart.ordered || (single && part.sets.length === 1) ? {} : { xOffset: { field: single ? "set" : "series", type: "nominal" } };
  const lowest = Math.min(...ok.map((point) => point.low ?? point.y)), highest = Math.max(...ok.map((point) => point.high ?? point.y));
  // An interval that reaches below 0 is cut at the end of a logarithmic axis.
  const above = Math.min(...ok.flatMap((point) => [point.low, point.y]).filter((value) => value > 0));
  const yScale = logY ? { type: "log", base: chart.logBase, nice: false, padding: 14, ...(lowest > 0 ? {} : { domainMin: above, clamp: true }) } : { type: "linear", zero: true, nice: true };
  const bounded = highest > 0 && Number.isFinite(lowest);
  const ticks = logY && bounded && chart.logBase === 10 ? { values: lowest > 0 ? decades(lowest, highest) : decades(above, highest).filter((tick) => tick >= above) } : { tickCount: 6 };
  const y = { field: "y", type: "quantitative", title: null, scale: yScale, axis: { labelExpr: labelExpression(chart.unit), labelOverlap: true, ...ticks } };
  const at = { x, ...offset };
  // With many points, only some have a mark, and a line has at most MAX_CORNERS corners.
  const step = ok.length > MANY ? Math.ceil(ok.length / MAX_MARKS) : 1, stride = Math.ceil(positions.length / MAX_CORNERS);
  const order = new Map(positions.map((position, index) => [position, index]));
  for (const point of values) {
    point.marked = !chart.ordered || order.get(point.x) % step === 0;
    point.lined = !chart.ordered || order.get(point.x) % stride === 0;
  }
  const dashes = by(styles.map((style) => style.dashes)), shapes = by(styles.map((style) => style.shape)), widths = { ...by(styles.map((style) => style.width)), type: "ordinal", sort: names };
  const layer = [];
  if (chart.low && bounded) {
    const band = ok.length > MANY && chart.ordered;
    const mark = band ? { type: "area", opacity: 0.15, aria: false } : { type: "rule", strokeWidth: 1.2, strokeOpacity: 0.75, aria: false };
    layer.push({ data: { name: "ranges" }, mark, encoding: { ...at, y: { ...y, field: "low" }, y2: { field: "high" }, color: colour, ...(band ? { detail: { field: "series" } } : { opacity }) } });
  }
  if (chart.ordered) {
    layer.push({ data: { name: "lines" }, mark: { type: "line", aria: false }, encoding: { ...at, y, color: colour, strokeDash: dashes, strokeWidth: widths, opacity, detail: { field: "series" } } });
  }
  const point = { type: "point", filled: true, size: ok.length > MANY ? 16 : 62 };
  // Only the last of several sets has filled marks: opacity alone is hard to see.
  const hollow = { test: `datum.set !== ${JSON.stringify(part.sets.at(-1))}` };
  const ink = { fill: { condition: { ...hollow, value: "var(--page)" }, ...colour }, stroke: { condition: { ...hollow, ...colour }, value: "var(--page)" }, strokeWidth: { condition: { ...hollow, value: 1.6 }, value: 0.6 } };
  layer.push({ name: "points", data: { name: "points" }, mark: { ...point, ariaRoleDescription: "value" }, encoding: { ...at, y, ...ink, shape: shapes, opacity, tooltip: { field: "tip" }, description: { field: "label" } } });
  if (ok.length < values.length) {
    layer.push({ name: "failures", data: { name: "failures" }, mark: { type: "text", text: "✕", fontSize: 13, fontWeight: "bold", ariaRoleDescription: "failed" }, encoding: { ...at, y: { field: "slot", type: "quantitative", scale: null, axis: null }, color: colour, tooltip: { field: "tip" }, description: { field: "label" } } });
  }
  return {
    width: "container", height: 270, autosize: { type: "fit-x", contains: "padding" },
    description: `${chart.title}, over ${chart.xTitle}: ${ok.length} values, ${values.length - ok.length} failures${step > 1 ? `; a mark at every ${step} places` : ""}`,
    datasets: datasets(values, choice),
    layer,
    config: {
      background: "transparent", font: "inherit", view: { stroke: null }, mark: { tooltip: true, invalid: null },
      axis: { labelColor: INK, titleColor: INK, gridColor: FAINT, domainColor: FAINT, tickColor: FAINT, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelFont: "system-ui, sans-serif", titleFont: "system-ui, sans-serif" },
    },
  };
}

const TIP = document.createElement("div");
TIP.className = "tip";
TIP.hidden = true;
TIP.ariaHidden = "true"; // the mark's own label has the same text
document.body.append(TIP);

/** Shows the tooltip of a mark beside the pointer. Vega's own tooltip can leave the window. */
function tooltip(handler, event, item, value) {
  TIP.hidden = value === null || value === undefined || value === "";
  if (TIP.hidden) return;
  const list = document.createElement("dl");
  for (const [key, text] of Object.entries(value)) {
    const term = document.createElement("dt"), description = document.createElement("dd");
    term.textContent = key;
    description.textContent = text;
    list.append(term, description);
  }
  TIP.replaceChildren(list);
  const { width, height } = TIP.getBoundingClientRect();
  const beside = (at, size, room) => Math.max(4, at + 14 + size < room ? at + 14 : at - 14 - size);
  TIP.style.left = `${beside(event.clientX, width, document.documentElement.clientWidth)}px`;
  TIP.style.top = `${beside(event.clientY, height, innerHeight)}px`;
}

const EMBED = { actions: { export: true, source: false, compiled: false, editor: false }, renderer: "svg", ast: true, downloadFileName: "chart", tooltip };

/** One chart in its figure. Draws again when an axis changes, and filters when the choice of attentions changes. */
class Chart {
  constructor(figure, chart, part) {
    Object.assign(this, { figure, chart, part });
    this.container = figure.querySelector(".chart");
    this.readout = figure.querySelector(".readout");
    this.points = makePoints(chart, part, part.rows);
    for (const box of figure.querySelectorAll("input[data-axis]")) box.addEventListener("change", () => this.draw());
    this.container.addEventListener("keydown", (event) => this.walk(event));
  }

  logarithmic(axis) {
    return this.figure.querySelector(`input[data-axis="${axis}"]`)?.checked ?? false;
  }

  async draw() {
    this.view?.finalize();
    const options = { ...this.part.choice, logX: this.logarithmic("x"), logY: this.logarithmic("y") };
    this.spec = specification(this.chart, this.part, this.points, options);
    const { view } = await window.vegaEmbed(this.container, this.spec, EMBED);
    this.view = view;
    this.container.querySelector("summary")?.setAttribute("aria-label", `Save the chart: ${this.chart.title}`);
  }

  async choose() {
    const drawn = new Set(this.spec.layer.map((layer) => layer.data.name));
    for (const [name, values] of Object.entries(datasets(this.points, this.part.choice))) if (drawn.has(name)) this.view.data(name, values);
    await this.view.runAsync();
  }

  /** Arrow keys move from mark to mark; the readout shows the mark's label, and screen readers speak it. */
  walk(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const marks = [...this.container.querySelectorAll("[aria-roledescription=value],[aria-roledescription=failed]")];
    if (!marks.length) return;
    const last = marks.indexOf(this.container.querySelector(".current"));
    marks[last]?.classList.remove("current");
    const mark = marks[last < 0 ? (step > 0 ? 0 : marks.length - 1) : (last + step + marks.length) % marks.length];
    mark.classList.add("current");
    this.readout.textContent = mark.getAttribute("aria-label");
  }
}
