"""One HTML file that holds everything: words, charts, tables, certificates, the machine and the command."""

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
from evals.report.changes import changes
from evals.report.charts import charts, named, styles
from evals.report.library import vega
from evals.report.sources import CONTEXT, LEARNED, Part, Source, facts, parts, read
from evals.report.words import verdicts
from evals.results.formatting import format_setting
from evals.stats.roofline import Peaks, merge_peaks

HERE = Path(__file__).parent
SCRIPTS = ("charts.js", "table.js", "page.js")
TITLES = {LEARNED: "What was learned", CONTEXT: "The longest context"}
ESSENTIAL = (
    *("set", "attention", "settings", "outcome", "detail", "latency_s", "latency_low_s", "latency_high_s", "samples", "rounds"),
    *("speedup", "speedup_low", "speedup_high", "verdict", "roofline_fraction", "peak_bytes", "state_bytes", "impl", "max_context"),
    *("learning_rate", "best", "seeds", "eval_seq_len", "accuracy", "accuracy_low", "accuracy_high", "bits_per_byte", "parameters"),
)
"""Columns of the table that are shown at first, beside the swept setting."""


def write(folders: Sequence[Path], path: Path) -> Path:
    """The report of these folders of results, at `path`, in place of what was there only once it is whole.

    Raises UsageError, in one sentence, if a folder holds no table of results.
    """
    page = render(read(folders))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render(sources: Sequence[Source]) -> str:
    """The page. Whatever comes from a config, a file name or a machine is text in it: the template escapes all of it.

    The page forbids itself the network, and every script but its own two, by their digests.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = format_setting
    found = parts(sources)
    scripts = [vega(), "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    described = [describe(part, index) for index, part in enumerate(found)]
    return environment.get_template("page.html").render(
        title=" · ".join(source.label for source in sources),
        sources=sources,
        parts=described,
        several=len(sources) > 1,
        data=[part["data"] for part in described],
        machines=machines(sources),
        certificates=[(source, certificates(source)) for source in sources],
        checks=[(check.name, check.description) for check in CHECKS],
        scripts=[(script, digest(script)) for script in scripts],
        style=(HERE / "page.css").read_text(encoding="utf-8"),
    )


def digest(script: str) -> str:
    """As a Content-Security-Policy names a script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def describe(part: Part, index: int) -> dict[str, Any]:
    """What the template and the script need of one part."""
    table = part.table
    settings = list(dict.fromkeys(table["settings"]))
    columns = [name for name in table if name == "settings" or (name not in ("sweep", "swept") and table[name].notna().any())]
    columns = [name for name in columns if name not in ("set", "settings")]
    first = [*(["set"] if len(part.sources) > 1 else []), "attention", *([part.swept] if part.swept in columns else [])]
    columns = list(dict.fromkeys([*first, *columns]))
    drawn = charts(part)
    words = [(source, verdicts(source)) for source in part.sources]
    data = {
        "index": index,
        "file": "-".join(source.label for source in part.sources).replace("/", "-"),
        "attentions": part.attentions,
        "sets": [source.label for source in part.sources],
        "settings": settings,
        "styles": styles(part.attentions),
        "charts": drawn,
        # What the table shows, and what only charts ask for.
        "columns": columns,
        "essential": [name for name in columns if name in (*ESSENTIAL, part.swept)],
        "values": values(table.reindex(columns=[*columns, *HIDDEN])),
        "hidden": list(HIDDEN),
    }
    along = f", by {named(part.swept)}" if table[part.swept].nunique() > 1 and part.kind != CONTEXT else ""
    return {
        "title": f"{TITLES.get(part.kind, 'Speed and memory')}{along}",
        "failed": bool((table["outcome"] != "ok").any()),
        "words": words,
        "changes": changes(part),
        "charts": drawn,
        "data": data,
    }


HIDDEN = ("set", "settings")


def values(table: pd.DataFrame) -> list[list[Any]]:
    """Row by row, in JSON's types; what is missing or infinite is None."""
    rows: list[list[Any]] = table.astype(object).to_numpy().tolist()
    return [
        [
            None if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)) else value
            for value in row
        ]
        for row in rows
    ]


# --- where it comes from --------------------------------------------------------------------------


def certificates(source: Source) -> list[dict[str, str]]:
    """Of each attention: whether it is certified, what stands against it, when that was found, and its options."""
    told = []
    for name, rows in source.table.groupby("attention", sort=False):
        record = source.certificates.get(str(name), {})
        objections = rows["detail"][rows["outcome"] == "uncertified"].dropna() if "detail" in rows else pd.Series(dtype=str)
        if (rows["outcome"] == "uncertified").any():
            verdict, why = "uncertified", next(iter(objections), "")
        elif (rows["outcome"] == "unsupported").all():
            verdict, why = "not made", "it does not run on this machine"
        else:
            verdict, why = "certified", ""
        described = next((one for one in reversed(source.descriptions) if name in one.get("candidates", {})), {})
        node = described.get("candidates", {}).get(name, {})
        told.append(
            {
                "name": str(name),
                "verdict": verdict,
                "why": str(why),
                "when": str(record.get("time", ""))[:10],
                "options": ", ".join(f"{key}={value}" for key, value in node.get("node", node).items()),
                "code": str(described.get("code", {}).get(name, "")),
            }
        )
    return told


def machines(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """Every machine that had a part in it, under each commit: its facts, and the highest rates that it was seen to reach."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for source in sources:
        for description in source.descriptions:
            known = facts(description)
            key = (source.label, str(sorted(known.items())))
            entry = found.setdefault(key, {"source": source, "facts": known, "times": [], "peaks": []})
            entry["times"].append(str(description.get("time", "")))
            if description.get("peaks"):
                entry["peaks"].append(Peaks.from_record(description["peaks"]))
    for entry in found.values():
        entry["since"], entry["until"] = min(entry["times"])[:16], max(entry["times"])[:16]
        rates = merge_peaks(*entry["peaks"]) if entry["peaks"] else None
        entry["rates"] = rates and {"flops": rates.flops_per_s, "bytes": max(rate for _, rate in rates.bytes_per_s)}
    return list(found.values())
