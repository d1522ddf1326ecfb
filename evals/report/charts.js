// Draws what charts.py describes. All values are data of Vega: names never become markup.

const UNITS = {
  s: [[1e-9, "ns"], [1e-6, "µs"], [1e-3, "ms"], [1, "s"]],
  B: [[1, "B"], [2 ** 10, "KiB"], [2 ** 20, "MiB"], [2 ** 30, "GiB"], [2 ** 40, "TiB"]],
};

/** A number with three digits in the largest unit that leaves at least 1 of it. */
function human(value, unit) {
  if (value === null || value === undefined) return "";
  if (unit === "%") return `${Number((100 * value).toPrecision(3))} %`;
  if (unit === "×") return `${Number(value.toPrecision(3))}×`;
  const scale = UNITS[unit];
  if (!scale) return Number(value.toPrecision(4)).toLocaleString("en");
  const [factor, name] = scale.findLast(([factor]) => value >= factor * (1 - 1e-9)) ?? scale[0];
  return `${Number((value / factor).toPrecision(3))} ${name}`;
}

/** A setting as people write it, as page.plain does: 8192 is 8k. */
function plain(value) {
  if (typeof value !== "number") return String(value);
  for (const [size, unit] of [[2 ** 20, "M"], [2 ** 10, "k"]]) {
    if (value >= size && value % 512 === 0) return `${Number((value / size).toPrecision(6))}${unit}`;
  }
  return String(Number(value.toPrecision(6)));
}

const TOLD = [
  ["samples", "samples"], ["rounds", "rounds"], ["seeds", "seeds"], ["roofline_fraction", "of the ceiling"], ["bound", "limited by"],
  ["verdict", "verdict"], ["relative_to", "relative to"], ["noise_floor", "noise floor"], ["impl", "implementation"], ["learning_rate", "learning rate"],
  ["commit", "commit"], ["processor", "processor"], ["torch", "torch"], ["comparison", "comparison"], ["study", "study"],
];
const FRACTIONS = new Set(["roofline_fraction", "noise_floor"]);

/** The rows that a chart shows, with what hovering tells. */
function cells(chart, part, rows) {
  const failed = new Map();
  const wanted = rows.filter((row) => {
    if (row.outcome !== "ok") return true;
    const fits = Object.entries(chart.only ?? {}).every(([column, value]) => (row[column] ?? null) === value);
    return fits && (!chart.same || row[chart.same[0]] === row[chart.same[1]]) && row[chart.y] !== null;
  });
  return wanted.map((row) => {
    const ok = row.outcome === "ok";
    const cell = { attention: row.attention, set: row.set, series: `${row.attention}\n${row.set}`, settings: row.settings, ok, x: row[chart.x] };
    const place = chart.place.replace("{}", plain(row[chart.x]));
    const tip = { attention: row.attention, at: place };
    if (part.sets.length > 1) tip.set = row.set;
    if (ok) {
      Object.assign(cell, { y: row[chart.y], low: row[chart.low] ?? null, high: row[chart.high] ?? null });
      tip.value = human(cell.y, chart.unit);
      if (cell.low !== null && cell.high !== null) tip["95 % interval"] = `${human(cell.low, chart.unit)} to ${human(cell.high, chart.unit)}`;
      for (const [column, name] of TOLD) {
        const value = row[column];
        if (value === null || value === undefined || value === "") continue;
        tip[name] = FRACTIONS.has(column) ? human(value, "%") : String(typeof value === "number" ? Number(value.toPrecision(4)) : value);
      }
    } else {
      // One mark above another where several failed at one place.
      const slot = failed.get(row[chart.x]) ?? 0;
      failed.set(row[chart.x], slot + 1);
      Object.assign(cell, { slot: 8 + 14 * slot, outcome: row.outcome });
      Object.assign(tip, { outcome: row.outcome, reason: row.detail || "none was given" });
    }
    cell.tip = tip;
    cell.said = Object.entries(tip).map(([key, value]) => `${key} ${value}`).join(", ");
    return cell;
  });
}

const K = "datum.value >= 1048576 && datum.value % 524288 == 0 ? format(datum.value / 1048576, '~g') + 'M' : " +
  "datum.value >= 1024 && datum.value % 512 == 0 ? format(datum.value / 1024, '~g') + 'k' : format(datum.value, '~g')";
const LABELS = {
  s: "datum.value >= 1 ? format(datum.value, '~g') + ' s' : datum.value >= 0.999e-3 ? format(datum.value * 1e3, '~r') + ' ms' : format(datum.value * 1e6, '~r') + ' µs'",
  B: "datum.value >= 1073741824 ? format(datum.value / 1073741824, '~r') + ' GiB' : datum.value >= 1048576 ? format(datum.value / 1048576, '~r') + ' MiB' : " +
    "datum.value >= 1024 ? format(datum.value / 1024, '~r') + ' KiB' : format(datum.value, '~r') + ' B'",
  "×": "format(datum.value, '~g') + '×'",
  "%": "format(datum.value, '~%')",
  "": "datum.value >= 1000 ? format(datum.value, '~s') : format(datum.value, '~g')",
};
const INK = "var(--ink)", FAINT = "var(--rule)";
const MANY = 800; // values, above which intervals are bands
const PLACES = 120; // most along a line or band: a chart is about 350 pixels wide at least
const MARKED = 240; // about as many of them have a mark then: an element each would make a page slow

/** Ticks of a logarithmic axis: 1, 2, 5 of each decade, or where there are many only the decades. */
function decades(lowest, highest) {
  const steps = highest / lowest > 300 ? [1] : [1, 2, 5];
  const powers = Array.from({ length: 40 }, (_, index) => index - 20).filter((power) => 10 ** (power + 1) > lowest / 2 && 10 ** power < 2 * highest);
  return powers.flatMap((power) => steps.map((step) => Number(`${step}e${power}`)));
}

/** What each layer draws of the chosen cells. Chosen here: a filter of Vega's own is interpreted for every cell, which takes its time. */
function datasets(values, { attentions, sets, settings }) {
  const shown = values.filter((cell) => attentions.includes(cell.attention) && sets.includes(cell.set) && cell.settings === settings);
  const ok = shown.filter((cell) => cell.ok);
  const lines = ok.filter((cell) => cell.lined);
  return { lines, ranges: lines.filter((cell) => cell.low !== null), points: ok.filter((cell) => cell.marked), failures: shown.filter((cell) => !cell.ok) };
}

/** A Vega-Lite chart of cells. Colours are CSS variables, so that light, dark and print need no second drawing. */
function specification(chart, part, values, { logX, logY, ...choice }) {
  const ok = values.filter((cell) => cell.ok);
  const names = part.attentions;
  const styles = names.map((name) => part.styles[name]);
  const single = new Set(values.map((cell) => cell.x)).size === 1;
  const places = [...new Set(values.map((cell) => cell.x))].sort((a, b) => (typeof a === "number" ? a - b : 0));
  const by = (range) => ({ field: "attention", type: "nominal", legend: null, scale: { domain: names, range } });
  const colour = by(names.map((_, index) => `var(--s${part.index}-${index})`));
  const opacity = { field: "set", type: "ordinal", sort: part.sets, legend: null, scale: { domain: part.sets, range: part.sets.map((_, index) => (part.sets.length === 1 ? 1 : 0.6 + (0.4 * index) / (part.sets.length - 1))) } };
  const x = chart.ordered
    ? { field: "x", type: "quantitative", title: chart.xTitle, scale: { type: logX ? "log" : "linear", ...(logX ? { base: 2 } : { zero: false }), nice: false, padding: 12 }, axis: { labelExpr: K, labelOverlap: true, grid: false, ...(places.length <= 16 ? { values: places } : {}) } }
    : { field: single ? "attention" : "x", type: "nominal", sort: single ? names : places, title: single ? null : chart.xTitle, axis: { labelAngle: single ? -30 : 0, grid: false } };
  const offset = chart.ordered || (single && part.sets.length === 1) ? {} : { xOffset: { field: single ? "set" : "series", type: "nominal" } };
  const lowest = Math.min(...ok.map((cell) => cell.low ?? cell.y)), highest = Math.max(...ok.map((cell) => cell.high ?? cell.y));
  // An interval may reach below 0, where a logarithmic axis has no place for it: it then goes to the axis' end.
  const above = Math.min(...ok.flatMap((cell) => [cell.low, cell.y]).filter((value) => value > 0));
  const yScale = logY ? { type: "log", base: chart.unit === "B" ? 2 : 10, nice: false, padding: 14, ...(lowest > 0 ? {} : { domainMin: above, clamp: true }) } : { type: "linear", zero: true, nice: true };
  const bounded = highest > 0 && Number.isFinite(lowest);
  const ticks = logY && bounded && chart.unit !== "B" ? { values: lowest > 0 ? decades(lowest, highest) : decades(above, highest).filter((tick) => tick >= above) } : { tickCount: 6 };
  const y = { field: "y", type: "quantitative", title: null, scale: yScale, axis: { labelExpr: LABELS[chart.unit], labelOverlap: true, ...ticks } };
  const at = { x, ...offset };
  // Where values are many, only every so many places have a mark, and a line at most PLACES corners.
  const step = ok.length > MANY ? Math.ceil(ok.length / MARKED) : 1, stride = Math.ceil(places.length / PLACES);
  const order = new Map(places.map((place, index) => [place, index]));
  for (const cell of values) {
    cell.marked = !chart.ordered || order.get(cell.x) % step === 0;
    cell.lined = !chart.ordered || order.get(cell.x) % stride === 0;
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
  // Of several sets only the last has filled marks: paleness alone is hard to see.
  const hollow = { test: `datum.set !== ${JSON.stringify(part.sets.at(-1))}` };
  const ink = { fill: { condition: { ...hollow, value: "var(--page)" }, ...colour }, stroke: { condition: { ...hollow, ...colour }, value: "var(--page)" }, strokeWidth: { condition: { ...hollow, value: 1.6 }, value: 0.6 } };
  layer.push({ name: "points", data: { name: "points" }, mark: { ...point, ariaRoleDescription: "value" }, encoding: { ...at, y, ...ink, shape: shapes, opacity, tooltip: { field: "tip" }, description: { field: "said" } } });
  if (ok.length < values.length) {
    layer.push({ name: "failures", data: { name: "failures" }, mark: { type: "text", text: "✕", fontSize: 13, fontWeight: "bold", ariaRoleDescription: "failed" }, encoding: { ...at, y: { field: "slot", type: "quantitative", scale: null, axis: null }, color: colour, tooltip: { field: "tip" }, description: { field: "said" } } });
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
TIP.ariaHidden = "true"; // what it tells is the mark's own label too
document.body.append(TIP);

/** Shows what stands at a mark beside the pointer, within the window; Vega's own leaves it at the edges. */
function tooltip(handler, event, item, value) {
  TIP.hidden = value === null || value === undefined || value === "";
  if (TIP.hidden) return;
  const list = document.createElement("dl");
  for (const [key, words] of Object.entries(value)) {
    const term = document.createElement("dt"), description = document.createElement("dd");
    term.textContent = key;
    description.textContent = words;
    list.append(term, description);
  }
  TIP.replaceChildren(list);
  const { width, height } = TIP.getBoundingClientRect();
  const beside = (at, size, room) => Math.max(4, at + 14 + size < room ? at + 14 : at - 14 - size);
  TIP.style.left = `${beside(event.clientX, width, document.documentElement.clientWidth)}px`;
  TIP.style.top = `${beside(event.clientY, height, innerHeight)}px`;
}

const EMBED = { actions: { export: true, source: false, compiled: false, editor: false }, renderer: "svg", ast: true, downloadFileName: "chart", tooltip };

/** One chart in its figure: drawn, drawn anew when its axes change, filtered when the choice of variants does. */
class Chart {
  constructor(figure, chart, part) {
    Object.assign(this, { figure, chart, part });
    this.place = figure.querySelector(".chart");
    this.readout = figure.querySelector(".readout");
    this.cells = cells(chart, part, part.rows);
    for (const box of figure.querySelectorAll("input[data-axis]")) box.addEventListener("change", () => this.draw());
    this.place.addEventListener("keydown", (event) => this.walk(event));
  }

  logarithmic(axis) {
    return this.figure.querySelector(`input[data-axis="${axis}"]`)?.checked ?? false;
  }

  async draw() {
    this.view?.finalize();
    const options = { ...this.part.choice, logX: this.logarithmic("x"), logY: this.logarithmic("y") };
    this.spec = specification(this.chart, this.part, this.cells, options);
    const { view } = await window.vegaEmbed(this.place, this.spec, EMBED);
    this.view = view;
    this.place.querySelector("summary")?.setAttribute("aria-label", `Save the chart: ${this.chart.title}`);
  }

  async choose() {
    const drawn = new Set(this.spec.layer.map((layer) => layer.data.name));
    for (const [name, values] of Object.entries(datasets(this.cells, this.part.choice))) if (drawn.has(name)) this.view.data(name, values);
    await this.view.runAsync();
  }

  /** Arrow keys go from mark to mark, and what stands there is shown and spoken. */
  walk(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const marks = [...this.place.querySelectorAll("[aria-roledescription=value],[aria-roledescription=failed]")];
    if (!marks.length) return;
    const last = marks.indexOf(this.place.querySelector(".current"));
    marks[last]?.classList.remove("current");
    const mark = marks[last < 0 ? (step > 0 ? 0 : marks.length - 1) : (last + step + marks.length) % marks.length];
    mark.classList.add("current");
    this.readout.textContent = mark.getAttribute("aria-label");
  }
}
