"""The origin of the study's numbers, and how certain they are."""

from pathlib import Path

from evals.paper.findings.data import required_sweep
from evals.paper.findings.text import enumerate_words, markdown_table, write_percent
from evals.paper.recipe import recipe
from evals.paper.sources import Source, find_sources
from evals.results.formatting import format_setting


def uncertainty(results: Path) -> str:
    """Describes how wide the intervals of latencies are, and which folders were measured with uncommitted code."""
    sweep = required_sweep(results, "seq_len")
    rows = sweep.rows[sweep.rows["latency_s"] > 0]
    half = (rows["latency_high_s"] - rows["latency_low_s"]) / 2 / rows["latency_s"]
    worst = rows.iloc[int(half.to_numpy().argmax())]
    changed = [source for source in _all_sources(results) if any("with changes" in commit for commit in source.commits)]
    names = enumerate_words(f"`{source.folder.relative_to(results).as_posix()}`" for source in changed)
    code = f" These were measured with code that had uncommitted changes: {names}." if changed else ""
    return (
        f"Half of a latency's interval is {write_percent(half.median())} of it in the median, {write_percent(half.max())} at most: "
        f"`{worst['attention']}` at {format_setting(worst[sweep.column])} tokens.{code}"
    )


def provenance(results: Path) -> str:
    """Tables the days, commits and processors of each folder."""
    rows = [
        [
            f"`{source.folder.relative_to(results).as_posix()}`",
            *("; ".join(words) or "?" for words in (source.days, source.commits, source.processors)),
        ]
        for source in _all_sources(results)
    ]
    return markdown_table(["results/paper/", "begun on", "commit", "processor"], rows)


def _all_sources(results: Path) -> list[Source]:
    """The existing folders of the recipe and of the figures' pattern."""
    patterns = [*(step.data for step in recipe()), "recall*"]
    return list({source.folder: source for pattern in patterns for source in find_sources(results, pattern)}.values())
