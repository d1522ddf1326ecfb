"""Findings on decoding: the latency of one token behind a context, and the state that decoding keeps."""

from pathlib import Path

from evals.paper.findings.data import OURS, describe_optional, required_sweep, rows_of
from evals.paper.findings.text import interval, markdown_table, write_bytes, write_seconds
from evals.paper.sources import Source
from evals.plots.heatmap import format_ratio


def decode(results: Path) -> str:
    """Describes the latency of one token of BSBR behind the shortest and the longest context."""
    sweep = required_sweep(results, "cpu/decode")
    rows = rows_of(sweep, OURS)
    first, last = rows.iloc[0], rows.iloc[-1]
    return (
        f"Behind {sweep.values[-1]} tokens one more takes {write_seconds(last['latency_s'])}"
        f"{interval(last['latency_low_s'], last['latency_high_s'], write_seconds)}, "
        f"{format_ratio(last['latency_s'] / first['latency_s'])} what it takes behind "
        f"{sweep.values[0]}{interval(first['latency_low_s'], first['latency_high_s'], write_seconds)}, at "
        f"{sweep.values[-1] / sweep.values[0]:.0f} times the context. "
        f"The state grows with it, to {write_bytes(last['state_bytes'])}."
    )


def decode_all(results: Path) -> str:
    """Tables the latency of one token of all attentions at the shortest and the longest context, and their state."""

    def describe(source: Source) -> str:
        sweep = source.first
        rows = [
            [
                f"`{name}`",
                *(write_seconds(cells["latency_s"].iloc[at]) for at in (0, -1)),
                write_bytes(cells["state_bytes"].iloc[-1]),
            ]
            for name, cells in sweep.by_attention.items()
            if (cells["outcome"].iloc[[0, -1]] == "ok").all()
        ]
        return markdown_table(["", f"behind {sweep.at(0)}", f"behind {sweep.at(-1)}", "state"], rows)

    return describe_optional(results, "decode", describe)
