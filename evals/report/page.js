// Draws the charts and tables of the page, and updates them when the user chooses attentions, sets or settings.

const { parts } = DATA;
const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));

/** The attentions, the sets and the group of settings that the controls of a part choose. */
function choice(section, part) {
  const chosen = (kind, names) => {
    const boxes = [...section.querySelectorAll(`input[data-${kind}]`)];
    return boxes.length ? boxes.filter((box) => box.checked).map((box) => names[Number(box.dataset[kind])]) : names;
  };
  const select = section.querySelector("select[data-settings]");
  return { attentions: chosen("attention", part.attentions), sets: chosen("set", part.sets), settings: part.settings[Number(select?.value ?? 0)] };
}

/** An attention's line and mark as a small picture, for the list of attentions. */
function swatch(part, index) {
  const style = part.styles[part.attentions[index]], colour = `var(--s${part.index}-${index})`;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const set = (name, values) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
    svg.append(node);
  };
  svg.setAttribute("viewBox", "-17 -6 34 12");
  svg.setAttribute("aria-hidden", "true");
  set("path", { d: "M-17 0H17", stroke: colour, "stroke-width": style.width, "stroke-dasharray": style.dashes.join(" ") });
  const shapes = { circle: "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", square: "M-4-4h8v8h-8z", diamond: "M0-5L5 0L0 5L-5 0z", cross: "M-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "triangle-up": "M0-5L5 4H-5z", "triangle-down": "M0 5L5-4H-5z", "triangle-left": "M-5 0L4-5V5z", "triangle-right": "M5 0L-4-5V5z" };
  set("path", { d: shapes[style.shape], fill: colour });
  return svg;
}

async function show(section, part) {
  const columns = [...part.columns, ...part.hidden];
  part.rows = part.values.map((values) => Object.fromEntries(columns.map((column, index) => [column, values[index]])));
  part.choice = choice(section, part);
  for (const label of section.querySelectorAll("[data-swatch]")) label.append(swatch(part, Number(label.dataset.swatch)));
  const charts = [...section.querySelectorAll("figure[data-chart]")].map((figure) => new Chart(figure, part.charts[Number(figure.dataset.chart)], part));
  for (const chart of charts) await chart.draw();
  let changes = 0;
  const choose = async () => {
    const change = ++changes;
    part.choice = choice(section, part);
    for (const chart of charts) {
      await frame(); // one chart per frame, so that the page stays responsive
      if (change !== changes) return; // a later change draws its own choice
      await chart.choose();
    }
  };
  for (const input of section.querySelectorAll("input[data-attention], input[data-set], select[data-settings]")) input.addEventListener("change", choose);
  for (const button of section.querySelectorAll("button[data-every]")) {
    button.addEventListener("click", () => {
      for (const box of section.querySelectorAll("input[data-attention]")) box.checked = button.dataset.every === "on";
      choose();
    });
  }
  const table = new Table(section.querySelector("[data-table]"), part);
  // Paper holds more rows than a screen.
  addEventListener("beforeprint", () => table.draw(0, 10 * PAGE));
  addEventListener("afterprint", () => table.draw());
  return { part, charts, table };
}

for (const box of document.querySelectorAll("input[name=theme]")) {
  box.addEventListener("change", () => { document.documentElement.dataset.theme = box.value; });
}
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.closest("div").querySelector("code").textContent);
    button.textContent = "copied";
  });
}
const sections = [...document.querySelectorAll("section[data-part]")];
window.report = await Promise.all(sections.map((section, index) => show(section, parts[index])));
document.documentElement.dataset.ready = "";
