"""The page of a report: one HTML file with summary, charts, tables, certificates, machines and commands."""

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from evals.certification.checks import CHECKS
from evals.errors import naming
from evals.report.changes import changes
from evals.report.charts import charts, details, short_axis_label, styles
from evals.report.library import vega
from evals.report.sources import CONTEXT, TIMING, TRAINING, Part, Source, group_sources, read_sources
from evals.report.summary import summarize
from evals.stats.roofline import Peaks, merge_peaks

HERE = Path(__file__).parent
SCRIPTS = ("charts.js", "table.js", "page.js")
TITLES = {TIMING: "Speed and memory", TRAINING: "Accuracy", CONTEXT: "The longest context"}
FIRST_COLUMNS = (
    *("set", "attention", "settings", "outcome", "detail", "latency_s", "latency_low_s", "latency_high_s", "samples", "rounds"),
    *("speedup", "speedup_low", "speedup_high", "verdict", "roofline_fraction", "peak_bytes", "state_bytes", "impl", "max_context"),
    *("learning_rate", "best", "seeds", "eval_seq_len", "accuracy", "accuracy_low", "accuracy_high", "bits_per_byte", "parameters"),
)
"""Columns that the table shows at first, besides the swept setting; a checkbox shows all."""
CHART_COLUMNS = ("set", "settings")
"""Columns that charts need, even if the table leaves them out."""


def write(folders: Sequence[Path], path: Path) -> Path:
    """Writes the report of result folders, and returns its path; an older file stays until the new one is complete.

    Raises:
        UsageError: if a folder has no table of results.
    """
    page = render(read_sources(folders))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(unfinished):
            unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render(sources: Sequence[Source]) -> str:
    """Renders the page as HTML.

    The template escapes everything that comes from a config, a file name or a machine. The page forbids itself the network,
    and every script except its two, by their digests.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [vega(), "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    parts = [_describe(part, index) for index, part in enumerate(group_sources(sources))]
    return environment.get_template("page.html").render(
        title=" · ".join(source.label for source in sources),
        sources=sources,
        parts=parts,
        several=len(sources) > 1,
        data={"details": details(), "parts": [part["data"] for part in parts]},
        machines=_machines(sources),
        certificates=[(source, _certificates(source)) for source in sources],
        checks=CHECKS,
        scripts=[(script, _digest(script)) for script in scripts],
        style=(HERE / "page.css").read_text(encoding="utf-8"),
    )


def _digest(script: str) -> str:
    """The digest by which a Content-Security-Policy allows a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _describe(part: Part, index: int) -> dict[str, Any]:
    """The template's variables of a part; `data` holds those of the script."""
    table = part.table
    first = [*(["set"] if len(part.sources) > 1 else []), "attention", *([part.swept] if part.swept in table else [])]
    known = [name for name in table if name not in ("sweep", "swept", *CHART_COLUMNS) and table[name].notna().any()]
    columns = list(dict.fromkeys([*first, *known]))
    data = {
        "index": index,
        "file": "-".join(source.label for source in part.sources).replace("/", "-"),
        "attentions": part.attentions,
        "sets": [source.label for source in part.sources],
        "settings": list(dict.fromkeys(table["settings"])),
        "styles": styles(part.attentions),
        "charts": charts(part),
        "columns": columns,
        "essential": [name for name in columns if name in (*FIRST_COLUMNS, part.swept)],
        "values": _json_rows(table.reindex(columns=[*columns, *CHART_COLUMNS])),
        "hidden": list(CHART_COLUMNS),
    }
    is_swept = part.kind != CONTEXT and table[part.swept].nunique() > 1
    return {
        "title": TITLES[part.kind] + (f", by {short_axis_label(part.swept)}" if is_swept else ""),
        "failed": bool((table["outcome"] != "ok").any()),
        "summaries": [(source, summarize(source)) for source in part.sources],
        "changes": changes(part),
        "charts": data["charts"],
        "data": data,
    }


def _json_rows(table: pd.DataFrame) -> list[list[Any]]:
    """The rows in JSON's types; a missing or infinite value is None."""
    rows: list[list[Any]] = table.astype(object).to_numpy().tolist()
    return [
        [
            None if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)) else value
            for value in row
        ]
        for row in rows
    ]


# --- origin of the results ------------------------------------------------------------------------


def _certificates(source: Source) -> list[dict[str, str]]:
    """For each attention its verdict, the failed check, the day of the certificate, its options and code digest."""
    rows = []
    for name, results in source.table.groupby("attention", sort=False):
        uncertified = results[results["outcome"] == "uncertified"]
        if len(uncertified):
            verdict, reason = "uncertified", next(iter(uncertified["detail"].dropna()), "") if "detail" in uncertified else ""
        elif (results["outcome"] == "unsupported").all():
            verdict, reason = "not made", "it does not run on this machine"
        else:
            verdict, reason = "certified", ""
        description = next((record for record in reversed(source.descriptions) if name in record.get("candidates", {})), {})
        node = description.get("candidates", {}).get(name, {})
        rows.append(
            {
                "name": str(name),
                "verdict": verdict,
                "reason": str(reason),
                "day": str(source.certificates.get(str(name), {}).get("time", ""))[:10],
                "options": ", ".join(f"{key}={value}" for key, value in node.get("node", node).items()),
                "code": str(description.get("code", {}).get(name, "")),
            }
        )
    return rows


def _machines(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """Every machine and commit that results come from: its facts, the time span, and the highest rates measured on it."""
    machines: dict[tuple[str, str], dict[str, Any]] = {}
    for source in sources:
        for description in source.descriptions:
            facts = description.get("provenance") or {}
            # The load changes from minute to minute.
            facts = {name: value for name, value in facts.items() if name != "load_1m" and value not in (None, "")}
            key = (source.label, str(sorted(facts.items())))
            machine = machines.setdefault(key, {"source": source, "facts": facts, "times": [], "peaks": []})
            machine["times"].append(str(description.get("time", "")))
            if description.get("peaks"):
                machine["peaks"].append(Peaks.from_record(description["peaks"]))
    for machine in machines.values():
        machine["since"], machine["until"] = min(machine["times"])[:16], max(machine["times"])[:16]
        peaks = merge_peaks(*machine["peaks"]) if machine["peaks"] else None
        machine["rates"] = peaks and {"flops": peaks.flops_per_s, "bytes": max(rate for _, rate in peaks.bytes_per_s)}
    return list(machines.values())
