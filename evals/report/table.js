// The table of all results: sorts, filters, shows one page at a time, and downloads as CSV.

const PAGE = 50;

/** Quotes a field of CSV as in RFC 4180. */
function quoted(value) {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

class Table {
  constructor(root, part) {
    Object.assign(this, { root, part, sorted: null, descending: false, page: 0 });
    this.query = root.querySelector("input[type=search]");
    this.all = root.querySelector("input[data-all]");
    this.table = root.querySelector("table");
    this.status = root.querySelector("[role=status]");
    this.rows = part.rows;
    // The text that the filter searches, joined once.
    this.texts = this.rows.map((row) => part.columns.map((column) => row[column] ?? "").join("\n").toLowerCase());
    this.query.addEventListener("input", () => this.filter());
    this.all.addEventListener("change", () => this.draw());
    root.querySelector("[data-csv]").addEventListener("click", () => this.download());
    root.querySelector("[data-back]").addEventListener("click", () => this.turnPage(-1));
    root.querySelector("[data-on]").addEventListener("click", () => this.turnPage(1));
    this.filter();
  }

  get columns() {
    return this.all.checked ? this.part.columns : this.part.columns.filter((column) => this.part.essential.includes(column));
  }

  filter() {
    const words = this.query.value.toLowerCase().split(/\s+/).filter(Boolean);
    this.filtered = this.rows.filter((_, index) => words.every((word) => this.texts[index].includes(word)));
    this.order();
  }

  order() {
    if (this.sorted !== null) {
      const column = this.sorted, sign = this.descending ? -1 : 1;
      this.filtered.sort((a, b) => {
        const [first, second] = [a[column], b[column]];
        if (first === null || second === null) return (first === null) - (second === null); // missing values come last in either direction
        return sign * (typeof first === "number" && typeof second === "number" ? first - second : String(first) < String(second) ? -1 : Number(String(first) > String(second)));
      });
    }
    this.page = 0;
    this.draw();
  }

  sort(column) {
    this.descending = this.sorted === column && !this.descending;
    this.sorted = column;
    this.order();
    this.table.querySelector(`th[aria-sort="${this.descending ? "descending" : "ascending"}"] button`)?.focus();
  }

  turnPage(step) {
    this.page = Math.min(Math.max(this.page + step, 0), this.pages - 1);
    this.draw();
  }

  get pages() {
    return Math.max(1, Math.ceil(this.filtered.length / PAGE));
  }

  /** Draws at most `count` filtered rows, beginning with index `from`. */
  draw(from = this.page * PAGE, count = PAGE) {
    const rows = this.filtered.slice(from, from + count);
    const head = document.createElement("tr");
    for (const column of this.columns) {
      const cell = document.createElement("th"), button = document.createElement("button");
      cell.scope = "col";
      if (column === this.sorted) cell.setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      button.type = "button";
      button.ariaLabel = column; // the name without its line breaks
      for (const [index, word] of column.split("_").entries()) button.append(...(index ? ["_", document.createElement("wbr")] : []), word);
      button.addEventListener("click", () => this.sort(column));
      cell.append(button);
      head.append(cell);
    }
    const body = rows.map((row) => {
      const line = document.createElement("tr");
      if (row.outcome && row.outcome !== "ok") line.className = "failed";
      for (const column of this.columns) {
        const cell = document.createElement("td"), value = row[column];
        if (typeof value === "number") {
          cell.className = "number";
          cell.textContent = Number.isInteger(value) ? value : Number(value.toPrecision(4));
          cell.title = value;
        } else {
          cell.textContent = value ?? "";
        }
        line.append(cell);
      }
      return line;
    });
    this.table.tHead.replaceChildren(head);
    this.table.tBodies[0].replaceChildren(...body);
    this.status.textContent = `${rows.length ? from + 1 : 0}–${from + rows.length} of ${this.filtered.length} rows${this.filtered.length < this.rows.length ? `, out of ${this.rows.length}` : ""}`;
  }

  /** The filtered rows in their order, with all columns and digits. */
  csv() {
    const lines = [this.part.columns, ...this.filtered.map((row) => this.part.columns.map((column) => row[column]))];
    return lines.map((line) => line.map(quoted).join(",")).join("\r\n") + "\r\n";
  }

  download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([this.csv()], { type: "text/csv" }));
    link.download = `${this.part.file}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  }
}
