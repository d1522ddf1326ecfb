"""What the study's page says of the data: sentences and tables, in Markdown, every number of which is read from results/paper.

Each takes the folder of results. What the page cannot do without raises ValueError, in one sentence, where it is not there; what
it can, says that it was not measured.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from evals.paper.captions import shown
from evals.paper.crossings import stretches
from evals.paper.radar import respects
from evals.paper.recipe import command_of, recipe, step_of
from evals.paper.sources import Source, found
from evals.plots.accuracy import AccuracySweep
from evals.plots.conversion import STAGES
from evals.plots.heatmap import times
from evals.results.formatting import format_setting
from evals.results.frames import Sweep
from evals.results.metrics import BYTES, SECONDS
from evals.results.settings import conditions, setting_name
from evals.stats.intervals import mean_interval

OURS = "bsbr"
GOAL = 0.8
"""Of what converting loses, the part that healing is to give back."""

# --- words and tables -----------------------------------------------------------------------------


def rows_of(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: text left, numbers right."""
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return "\n".join([lines[0], f"|:--{'|--:' * (len(heads) - 1)}|", *lines[1:]])


def listed(words: Iterable[str]) -> str:
    """a, b and c; none where there is none."""
    *first, last = list(words) or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def between(low: float, high: float, form: Callable[[float], str]) -> str:
    """An interval in brackets; nothing where it is not known."""
    return f" [{form(low)}, {form(high)}]" if math.isfinite(low) and math.isfinite(high) else ""


def digits(value: float) -> str:
    return f"{value:.3g}"


def percent(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


def seconds(value: float) -> str:
    return SECONDS.format(value, digits=3)


def in_bytes(value: float) -> str:
    return BYTES.format(value, digits=3)


# --- what there is --------------------------------------------------------------------------------


@cache
def source(results: Path, data: str) -> Source:
    """Raises ValueError, in one sentence with the command that makes it, where it is not there."""
    there = found(results, data)
    if not there:
        command = command_of(data, shown(results))
        made = f"; `{command}` makes it" if command else ""
        raise ValueError(f"{shown(results)}/{data} holds no results, and the study's page needs them{made}")
    return there[0]


def sweep_of(results: Path, data: str) -> Sweep:
    return next(iter(source(results, data).sets.values()))  # type: ignore[no-any-return]  # of the folders that are timed


def optional(results: Path, data: str, tell: Callable[[Source], str]) -> str:
    """What is told of each folder that a name or pattern fits; that it is not measured where there is none."""
    there = found(results, data)
    if there:
        return "\n\n".join(tell(one) for one in there)
    step, command = step_of(data), command_of(data, shown(results))
    made = f" `{command}` does it." if command else ""
    what = f", {step.what}" if step else ""
    return f"*Not measured yet{what}.*{made}"


# --- speed and memory -----------------------------------------------------------------------------


def setup(results: Path) -> str:
    sweep = sweep_of(results, "seq_len")
    floor = sweep.rows["noise_floor"].max() if "noise_floor" in sweep.rows else math.nan
    noise = f" The reference differs from itself by at most {floor:.1%}." if floor > 0 else ""
    rounds = sweep.rows["rounds"].dropna()
    names = listed(f"`{name}`" for name in sweep.cells)
    return (
        f"{names}, at {sweep.at(0)} to {sweep.at(-1)}: {conditions(sweep.rows, sweep.column)}; "
        f"{rounds.min():.0f} to {rounds.max():.0f} rounds of fresh processes each.{noise}"
    )


def speed(results: Path) -> str:
    """Ours against the reference, over length."""
    sweep = sweep_of(results, "seq_len")
    ours, reference = _cells(sweep, OURS), sweep.reference
    last = ours.iloc[-1]
    took = f"{seconds(last['latency_s'])}{between(last['latency_low_s'], last['latency_high_s'], seconds)}"
    ratio = f"{digits(last['speedup'])}{between(last['speedup_low'], last['speedup_high'], digits)}"
    said = [f"At {sweep.at(-1)} `{OURS}` takes {took}, and is {ratio} times as fast as `{reference}`."]
    by_verdict = {
        "faster": "Beyond doubt it is faster at {} tokens",
        "slower": "slower at {}",
        "same": "as fast at {}",
        "ambiguous": "and it is undecided at {}",
    }
    told = []
    for verdict, words in by_verdict.items():
        places = [format_setting(place) for place, found in zip(sweep.places, ours["verdict"], strict=True) if found == verdict]
        told += [words.format(listed(places))] if places else []
    said.append(f"{', '.join(told)}." if told else "")
    said += [f"They cross at {_at(row)} tokens." for row in _crossings(sweep, OURS, reference) if row["at"] > 0]
    return " ".join(filter(None, said))


def rivals(results: Path) -> str:
    """Ours against every other, by length."""
    sweep = sweep_of(results, "seq_len")
    rows = []
    for name in sweep.cells:
        if name != OURS:
            cut = stretches(sweep, OURS, name)
            states = (
                [f"{one.low:.0f} to {one.high:.0f}" for one in cut if one.state == state]
                for state in ("slower", "unclear", "faster")
            )
            rows.append([f"`{name}`", *(", ".join(state) or "–" for state in states)])
    return rows_of(["against", f"{OURS} is slower", "unclear", f"{OURS} is faster"], rows)


def exponents(results: Path) -> str:
    """How latency grows."""
    sweep = sweep_of(results, "seq_len")
    if sweep.scaling is None:
        raise ValueError(f"{shown(results)}/seq_len/scaling.csv is not there, and the study's page needs it: run the sweep again")
    rows = []
    for row in sweep.scaling[sweep.scaling["quantity"] == "latency"].to_dict("records"):
        refused = isinstance(row["note"], str) and row["note"]
        p = str(row["note"]) if refused else f"{row['exponent']:.2f}{between(row['exponent_low'], row['exponent_high'], _two)}"
        declared = "" if pd.isna(row["declared_exponent"]) else f"{row['declared_exponent']:.2f}"
        agrees = row.get("agreement")
        rows.append([f"`{row['attention']}`", p, declared, agrees if isinstance(agrees, str) else ""])
    return rows_of(["attention", "p, measured", "p, of its FLOPs", "the two"], rows)


def memory(results: Path) -> str:
    """Peak memory and parameters of ours against the reference, and who needs less."""
    sweep = sweep_of(results, "seq_len")
    last = {name: rows.iloc[-1] for name, rows in sweep.cells.items()}
    ours, reference = last[OURS], last[sweep.reference]
    less = [f"`{name}`" for name, row in last.items() if row["peak_bytes"] < ours["peak_bytes"]]
    return (
        f"At {sweep.at(-1)} `{OURS}` needs {in_bytes(ours['peak_bytes'])} above inputs and parameters, "
        f"{times(ours['peak_bytes'] / reference['peak_bytes'])} what `{sweep.reference}` needs; less is needed by {listed(less)}. "
        f"Its parameters are {in_bytes(ours['parameter_bytes'])}, against {in_bytes(reference['parameter_bytes'])}. "
        f"To decode behind that context it keeps {in_bytes(ours['state_bytes'])}, "
        f"{times(ours['state_bytes'] / reference['state_bytes'])} what `{sweep.reference}` keeps."
    )


def ceiling(results: Path) -> str:
    """How much of the machine is used at the greatest length."""
    sweep = sweep_of(results, "seq_len")
    parts = {name: float(rows["roofline_fraction"].iloc[-1]) for name, rows in sweep.cells.items()}
    known = sorted((name for name in parts if parts[name] > 0), key=lambda name: -parts[name])
    return f"At {sweep.at(-1)}: {listed(f'`{name}` {percent(parts[name])}' for name in known)}."


def losses(results: Path) -> str:
    """In which respects ours is not the best, and who is."""
    sweep = sweep_of(results, "seq_len")
    there = found(results, "retrieval")
    learned = next(iter(there[0].sets.values())) if there else None
    rows = []
    for axis in respects(sweep, learned):
        if OURS in axis.costs:
            best = min(axis.costs, key=lambda name: axis.costs[name])
            ratio = axis.costs[OURS] / axis.costs[best]
            better = sum(cost < axis.costs[OURS] for cost in axis.costs.values())
            rows.append([axis.words, f"`{best}`", "1×" if best == OURS else times(ratio), f"{better} of {len(axis.costs) - 1}"])
    return rows_of(["", "best", f"{OURS} is worse by", "others that are better"], rows)


def decode(results: Path) -> str:
    """What a token costs behind contexts, of ours alone."""
    sweep = sweep_of(results, "cpu/decode")
    cells = _cells(sweep, OURS)
    first, last = cells.iloc[0], cells.iloc[-1]
    ratio = last["latency_s"] / first["latency_s"]
    return (
        f"Behind {sweep.places[-1]} tokens one more takes {seconds(last['latency_s'])}"
        f"{between(last['latency_low_s'], last['latency_high_s'], seconds)}, {times(ratio)} what it takes behind "
        f"{sweep.places[0]}{between(first['latency_low_s'], first['latency_high_s'], seconds)}, at "
        f"{sweep.places[-1] / sweep.places[0]:.0f} times the context. The state grows with it, to {in_bytes(last['state_bytes'])}."
    )


def decode_all(results: Path) -> str:
    """The same of all attentions, at the least and the greatest context."""

    def tell(one: Source) -> str:
        sweep: Sweep = next(iter(one.sets.values()))
        rows = [
            [f"`{name}`", *(seconds(cells["latency_s"].iloc[at]) for at in (0, -1)), in_bytes(cells["state_bytes"].iloc[-1])]
            for name, cells in sweep.cells.items()
            if (cells["outcome"].iloc[[0, -1]] == "ok").all()
        ]
        return rows_of(["", f"behind {sweep.at(0)}", f"behind {sweep.at(-1)}", "state"], rows)

    return optional(results, "decode", tell)


def doubt(results: Path) -> str:
    """How wide intervals are, and whether the code that was measured is a commit's."""
    sweep = sweep_of(results, "seq_len")
    rows = sweep.rows[sweep.rows["latency_s"] > 0]
    half = (rows["latency_high_s"] - rows["latency_low_s"]) / 2 / rows["latency_s"]
    worst = rows.iloc[int(half.to_numpy().argmax())]
    changed = [one for one in everything(results) if any("with changes" in commit for commit in one.commits)]
    names = listed(f"`{one.folder.relative_to(results).as_posix()}`" for one in changed)
    code = f" The code had changes that were not yet committed when these were measured: {names}." if changed else ""
    return (
        f"Half of a latency's interval is {percent(half.median())} of it in the middle case, {percent(half.max())} in the worst, "
        f"`{worst['attention']}` at {format_setting(worst[sweep.column])} tokens.{code}"
    )


# --- what is remembered ---------------------------------------------------------------------------


def recall(results: Path) -> str:
    return optional(results, "recall", _accuracies)


def recall_wider(results: Path) -> str:
    return "\n\n".join(optional(results, data, _accuracies) for data in ("recall_256", "recall_512"))


def recall_sizes(results: Path) -> str:
    return optional(results, "recall_sizes", _accuracies)


def retrieval(results: Path) -> str:
    return optional(results, "retrieval", _accuracies)


def retrieval_length(results: Path) -> str:
    return optional(results, "retrieval_needle", lambda one: _by_length(one, "accuracy"))


def extrapolation(results: Path) -> str:
    return optional(results, "length_extrapolation", lambda one: _by_length(one, "accuracy"))


def needle(results: Path) -> str:
    return optional(results, "needle", lambda one: _by_length(one, "accuracy"))


def language(results: Path) -> str:
    return optional(results, "language_modeling", lambda one: _by_length(one, "bits_per_byte"))


def _accuracies(one: Source) -> str:
    """Accuracy wherever the sweep goes, the best at its furthest first, and what is kept for it."""
    learned: AccuracySweep = next(iter(one.sets.values()))
    asked, swept = learned.trained, learned.swept
    alike = asked.groupby("attention")["state_bytes"].nunique().max() == 1
    at = {(row["attention"], row[swept]): row for _, row in asked.iterrows()}
    places = sorted(asked[swept].unique())
    last = learned.at_last(asked).sort_values("accuracy", ascending=False, kind="stable").set_index("attention")
    kept = last["state_bytes"]
    of = kept.get(next((name for name in ("standard", *kept.index) if name in kept.index), ""), math.nan)

    def told(name: str, place: Any) -> str:
        row = at.get((name, place))
        if row is None:
            return ""
        return _mean(row, "accuracy") if alike else f"{_mean(row, 'accuracy')}, {in_bytes(row['state_bytes'])}"

    rows = [
        [f"`{name}`", *(told(name, place) for place in places), *([in_bytes(kept[name]), times(kept[name] / of)] if alike else [])]
        for name in last.index
    ]
    heads = [f"{setting_name(swept)} {format_setting(place)}" for place in places] if len(places) > 1 else ["accuracy"]
    words = learned.words(asked, left=-math.inf)
    return f"{_sentence(words)}\n\n{rows_of(['', *heads, *(['state', 'of standard'] if alike else [])], rows)}"


def _by_length(one: Source, column: str) -> str:
    """A column at each length that was asked, of what was trained where the sweep goes furthest."""
    learned: AccuracySweep = next(iter(one.sets.values()))
    asked = learned.at_last(learned.whole)
    lengths = sorted(asked["eval_seq_len"].unique())
    rows = []
    for name, own in asked.groupby("attention", sort=False):
        at = {row["eval_seq_len"]: row for _, row in own.iterrows()}
        rows.append([f"`{name}`", *(_mean(at[length], column) if length in at else "" for length in lengths)])
    head = f"{column.replace('_', ' ')} at"
    return f"{_sentence(learned.words(asked, left=-math.inf))}\n\n{rows_of([head, *map(format_setting, lengths)], rows)}"


def _mean(row: "pd.Series[Any]", column: str) -> str:
    value, low, high = (row[one] for one in (column, f"{column}_low", f"{column}_high"))
    return f"{value:.3f}{f' ± {(high - low) / 2:.2g}' if high > low else ''}"


def _sentence(words: str) -> str:
    return f"{'; '.join(line for line in words.splitlines() if line)}:"


# --- conversion -----------------------------------------------------------------------------------


def conversion(results: Path) -> str:
    """Perplexity before and after healing, how much came back, and how many met the goal."""
    table = source(results, "distillation").table
    rows, met = [], []
    for (model, overlap), own in table.groupby(["model", "chunk_overlap"]):
        of = {str(stage): found for stage, found in own.groupby("stage")}
        closed = mean_interval(list(of["distilled"]["gap_closed"]))
        met.append(closed.value >= GOAL)
        back = percent(closed.value) + (f" ± {percent((closed.high - closed.low) / 2)}" if closed.high > closed.low else "")
        numbers = [f"{of[stage]['perplexity'].mean():.2f}" for stage in STAGES]
        agreed = [percent(of[stage]["top_1"].mean()) for stage in ("converted", "distilled")]
        rows.append([f"{model}, {overlap} tokens of overlap", *numbers, back, *agreed, f"{own['seed'].nunique()}"])
    heads = ["", "original", "converted", "distilled", "came back", "top 1, converted", "top 1, distilled", "seeds"]
    goal = f"The goal, that {percent(GOAL)} of what converting lost comes back, is met by {sum(met)} of {len(met)}."
    return f"{rows_of(heads, rows)}\n\n{goal}"


def conversion_speed(results: Path) -> str:
    """How fast a conversion is beside its original."""

    def tell(one: Source) -> str:
        sweep: Sweep = next(iter(one.sets.values()))
        names = [name for name in sweep.cells if name != sweep.reference]
        rows = []
        for name in names:
            cells = sweep.cells[name]
            ratios = [
                f"{digits(cell['speedup'])}{between(cell['speedup_low'], cell['speedup_high'], digits)}"
                if cell["outcome"] == "ok"
                else cell["outcome"]
                for _, cell in cells.iterrows()
            ]
            rows.append([f"`{name}`", *ratios])
        head = f"speed-up over `{sweep.reference}` at"
        return f"{conditions(sweep.rows, sweep.column)}:\n\n{rows_of([head, *sweep.ticks], rows)}"

    return optional(results, "conversion", tell)


# --- where it comes from --------------------------------------------------------------------------


def everything(results: Path) -> list[Source]:
    """The folders of the recipe that are there, and those of patterns that figures take."""
    names = [step.data for step in recipe()]
    return list({one.folder: one for data in (*names, "recall*") for one in found(results, data)}.values())


def provenance(results: Path) -> str:
    """A row a folder: when, of which commit, on which processor."""
    rows = [
        [
            f"`{one.folder.relative_to(results).as_posix()}`",
            *("; ".join(words) or "?" for words in (one.days, one.commits, one.processors)),
        ]
        for one in everything(results)
    ]
    return rows_of(["results/paper/", "begun on", "commit", "processor"], rows)


FINDINGS: dict[str, Callable[[Path], str]] = {
    tell.__name__: tell
    for tell in (
        *(setup, speed, rivals, exponents, memory, ceiling, losses, decode, decode_all, doubt),
        *(recall, recall_wider, recall_sizes, retrieval, retrieval_length, extrapolation, needle, language),
        *(conversion, conversion_speed, provenance),
    )
}


def _cells(sweep: Sweep, name: str) -> pd.DataFrame:
    if name not in sweep.cells:
        raise ValueError(f"the study is about {name}, and its results hold {listed(sweep.cells)}")
    return sweep.cells[name]


def _crossings(sweep: Sweep, first: str, second: str) -> list[dict[Any, Any]]:
    if sweep.crossovers is None:
        return []
    pair = sweep.crossovers[["first", "second"]]
    return sweep.crossovers[pair.isin([first]).any(axis=1) & pair.isin([second]).any(axis=1)].to_dict("records")


def _at(row: dict[Any, Any]) -> str:
    return f"{row['at']:.0f}{between(row['at_low'], row['at_high'], lambda value: f'{value:.0f}')}"


def _two(value: float) -> str:
    return f"{value:.2f}"
