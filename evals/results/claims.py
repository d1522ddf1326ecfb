"""TODO: what lives here."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from evals.errors import UsageError
from evals.results.folder import ResultFolder
from evals.stats.crossovers import crossovers, crossovers_from_intervals
from evals.stats.intervals import Interval
from evals.stats.scaling import fit_scaling

SLACK, MARGIN = 0.05, 0.25
"""n^p is refuted where p is further than SLACK from the interval, supported where all of that lies within MARGIN of p."""

WORDS = {
    "faster": "{first} runs at {ratio} the speed of {second}",
    "slower": "{first} takes {ratio} the time of {second}",
    "less": "{second} uses {ratio} the memory of {first}",
    "more": "{first} uses {ratio} the memory of {second}",
}

NAME, NUMBER = r"[\w.+-]+", r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
SIZE = rf"(?:(?P<factor>{NUMBER})\s*[x×]\s+|(?P<percent>{NUMBER})\s*%\s+)?"
FORMS = tuple(
    re.compile(rf"(?P<first>{NAME})\s+(?:is\s+)?{form}(?:\s+at\s+(?P<settings>.+))?")
    for form in (
        rf"{SIZE}(?P<way>faster|slower)\s+than\s+(?P<second>{NAME})",
        rf"uses\s+{SIZE}(?P<way>less|more)\s+memory\s+than\s+(?P<second>{NAME})",
        rf"scales\s+as\s+n(?:\s*\^\s*(?P<power>{NUMBER}))?(?:\s+in\s+(?P<way>latency|memory))?",
        rf"overtakes\s+(?P<second>{NAME})\s+(?P<way>before|after)\s+seq_len\s+(?P<size>{NUMBER})",
    )
)


@dataclass(frozen=True)
class Claim:
    first: str
    second: str  # empty where one attention is claimed to scale
    way: str  # faster, slower; less, more; latency, memory; before, after
    amount: float  # the least ratio, the exponent, or the length
    settings: dict[str, str]


@dataclass(frozen=True)
class Finding:
    verdict: str
    margin: float  # how far from being refuted; the least is the worst
    said: str
    decides: str = ""


def parse(text: str) -> Claim:
    """Raises UsageError with the grammar and an example for what is no claim."""
    found = next((match for form in FORMS if (match := form.fullmatch(text.strip()))), None)
    given: defaultdict[str, str | None] = defaultdict(lambda: None, found.groupdict() if found else {})
    pairs = [pair.replace("=", " ").split() for pair in re.split(r"\s+and\s+", given["settings"] or "") if pair]
    if found is None or any(len(pair) != 2 for pair in pairs):
        grammar = "; ".join(line.strip() for line in str(__doc__).splitlines()[2:6])
        raise UsageError(f"{text!r} is no claim; one reads {grammar}; each may end in at <setting> <value> and …: {EXAMPLE!r}")
    way = given["way"] or "latency"
    amount = float(given["factor"] or given["power"] or given["size"] or 1.0)
    if given["percent"]:
        percent = float(given["percent"])
        if way == "less" and percent >= 100:
            raise UsageError(f"nothing uses {percent:g}% less memory: give less than 100%, or a factor such as 2x")
        amount = 1 / (1 - percent / 100) if way == "less" else 1 + percent / 100
    if way in ("faster", "slower", "less", "more") and amount < 1:
        raise UsageError(f"a factor must be at least 1, got {amount:g}x: say it the other way round, as in {EXAMPLE!r}")
    if given["first"] == given["second"]:
        raise UsageError(f"{given['first']} is compared with itself: name two attentions, as in {EXAMPLE!r}")
    return Claim(str(given["first"]), given["second"] or "", way, amount, {pair[0]: pair[1] for pair in pairs})


# --- the verdict ----------------------------------------------------------------------------------


def findings(results: ResultFolder, claim: Claim) -> list[Finding]:
    """One a setting that was measured, or one a range of lengths where the claim is about how something grows."""
    rows = results.rows([claim.first, claim.second], claim.settings)
    along = claim.way in ("latency", "memory", "before", "after")
    keys = [key for key in results.settings if not (along and key == "seq_len")]
    judge = _grows if not claim.second else _overtakes if along else _compare
    told = [key for key in keys if rows[key].nunique() > 1]
    found = []
    for _, cell in rows.groupby(keys, dropna=False, sort=False):
        where = " and ".join(f"{key} {cell[key].iloc[0]}" for key in dict.fromkeys([*claim.settings, *told]))
        if set(cell["attention"]) >= {claim.first, claim.second} - {""}:
            found.append(judge(results, claim, cell.sort_values("seq_len"), f" at {where}" if where else ""))
    return found


def _compare(results: ResultFolder, claim: Claim, cell: pd.DataFrame, where: str) -> Finding:
    ours, theirs = (cell[cell["attention"] == name].iloc[-1] for name in (claim.first, claim.second))
    memory = claim.way in ("less", "more")
    column = "peak_bytes" if memory else "latency_s"
    for row in (ours, theirs):
        if row["outcome"] != "ok" or not row[column] > 0:
            gave = row["outcome"] if row["outcome"] != "ok" else f"no {column}"
            return Finding("undecided", -math.inf, f"{row['attention']} gave {gave}{where}", f"a measurement of it{where}")
    if memory:
        ratio, how, floor = Interval(*[theirs[column] / ours[column]] * 3), "peak memory is exact", 0.0
    else:
        (ratio, how), floor = results.speedup(ours, theirs), results.floor(cell)
    if claim.way in ("slower", "more"):
        ratio = Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    rounds = min(ours["rounds"], theirs["rounds"])
    verdict, decides = weigh(ratio, claim.amount, floor, rounds)
    noise = "" if memory else f", {rounds:.0f} rounds; noise floor {_percent(floor)}"
    asked = f"{claim.amount:.4g}x" if claim.amount > 1 else "more than 1x"
    words = WORDS[claim.way].format(first=claim.first, second=claim.second, ratio=f"{ratio.value:.4g}x")
    said = f"{words} ({ratio.low:.4g}x to {ratio.high:.4g}x){where}, claimed {asked}\n{how}{noise}"
    return Finding(verdict, math.log(ratio.low / claim.amount), said, decides)


def weigh(ratio: Interval, claimed: float, floor: float, rounds: float) -> tuple[str, str]:
    """The verdict on `ratio >= claimed` (> 1 where nothing more is claimed), and what would decide one that is open."""
    visible = math.expm1(abs(math.log(ratio.value))) > floor
    # That something is too small for the claim can be seen whatever the noise floor; that it is slower at all cannot.
    if (ratio.high < claimed and (claimed > 1 or visible)) or ratio.low == ratio.high == claimed == 1:
        return "refuted", ""
    if ratio.low >= claimed and ratio.low > 1 and visible and not 1 < claimed < 1 + floor:
        return "supported", ""
    if math.isinf(floor):
        return "undecided", "a noise floor, which two rounds of a comparison with its reference give"
    if 1 < claimed < 1 + floor or not visible:
        return "undecided", f"a quieter machine: what is claimed or seen is smaller than the noise floor, {floor:.1%}"
    if ratio.low < claimed <= ratio.high and ratio.value != claimed:
        needed = rounds * (math.log(ratio.high / ratio.low) / 2 / math.log(ratio.value / claimed)) ** 2
        return "undecided", f"a narrower interval: about {max(math.ceil(needed), rounds + 1):.0f} rounds, if the ratio stays"
    return "undecided", "more rounds"


def _grows(results: ResultFolder, claim: Claim, cell: pd.DataFrame, where: str) -> Finding:
    column = "peak_bytes" if claim.way == "memory" else "latency_s"
    measured = [row for _, row in cell.iterrows() if row["outcome"] == "ok" and row[column] > 0]
    if not measured:
        return Finding("undecided", -math.inf, f"{claim.first} has no {column}{where}", "a measurement")
    sizes = [float(row["seq_len"]) for row in measured]
    fit = fit_scaling(sizes, [[row[column]] if claim.way == "memory" else results.rounds(row) for row in measured])
    range_ = f"over {len(sizes)} lengths, {min(sizes):g} to {max(sizes):g}{where}"
    if fit.note:
        return Finding(
            "undecided", -math.inf, f"{claim.way} of {claim.first} {range_}: {fit.note}", "longer lengths, and more of them"
        )
    low, value, high = fit.exponent.low, fit.exponent.value, fit.exponent.high
    outside = max(low - claim.amount, claim.amount - high)
    spread = max(high - claim.amount, claim.amount - low)
    verdict = "refuted" if outside > SLACK else "supported" if spread <= MARGIN else "undecided"
    said = f"{claim.way} of {claim.first} grows as n^{value:.3f} ({low:.3f} to {high:.3f}) {range_}, claimed n^{claim.amount:g}"
    return Finding(verdict, -spread, said, f"more lengths, until the interval lies within {MARGIN} of it")


def _overtakes(results: ResultFolder, claim: Claim, cell: pd.DataFrame, where: str) -> Finding:
    """When the first became faster for good: within (low, high), both known from where the curves cross."""
    ok = cell[(cell["outcome"] == "ok") & cell["latency_low_s"].notna()]
    first, second = (
        {row["seq_len"]: row for _, row in ok[ok["attention"] == name].iterrows()} for name in (claim.first, claim.second)
    )
    sizes = [size for size in first if size in second]
    if len(sizes) < 2:
        return Finding("undecided", -math.inf, f"the two have fewer than 2 lengths in common{where}", "more lengths")
    ratios = [results.log_ratios(first[size], second[size]) for size in sizes]
    if all(len(one) > 1 for one in ratios):
        how, crossings, last = "paired", crossovers(sizes, ratios), float(np.mean(ratios[-1]))
    else:
        columns = ["latency_s", "latency_low_s", "latency_high_s"]
        both = [[Interval(*map(float, rows[size][columns])) for size in sizes] for rows in (first, second)]
        how, crossings = "computed from two intervals, not paired", crossovers_from_intervals(sizes, *both)
        last = math.log(both[0][-1].value / both[1][-1].value)
    floor = results.floor(cell)
    end = crossings[-1].at if crossings else Interval(math.nan, 0.0, min(sizes))
    if last > 0 and (not crossings or end.high < math.inf):
        low, high, said = max(sizes), math.inf, f"{claim.first} is slower at {max(sizes):g}, the longest measured"
    elif not crossings:
        low, high, said = 0.0, min(sizes), f"{claim.first} is faster at all lengths from {min(sizes):g} on"
    else:
        low, high, at = end.low, end.high, "some length" if math.isnan(end.value) else f"{end.value:.0f}"
        said = f"{claim.first} overtakes {claim.second} at {at} ({end.low:.0f} to {end.high:.0f})"
    before, after = high <= claim.amount, low >= claim.amount
    verdict, margin = "undecided", -math.inf
    certain = last < 0 and high < math.inf and math.expm1(-last) > floor
    if (before if claim.way == "before" else after) and certain:
        verdict, margin = "supported", abs(math.log(claim.amount / (high if before else low)))
    elif (after and low > 0) if claim.way == "before" else before and certain:
        verdict = "refuted"
    measured = f"{how}, {len(sizes)} lengths from {min(sizes):g} to {max(sizes):g}; noise floor {_percent(floor)}"
    return Finding(verdict, margin, f"{said}{where}\n{measured}", "more rounds, and lengths on both sides of where they cross")


def _percent(floor: float) -> str:
    return "unknown" if math.isinf(floor) else f"{floor:.1%}"


# --- the command ----------------------------------------------------------------------------------


def evidence(results: ResultFolder, claim: Claim) -> tuple[str, str]:
    """The verdict of one folder, and the lines that say why; the worst setting speaks for all. Raises UsageError for none."""
    found = findings(results, claim)
    if not found:
        raise UsageError(f"{claim.first} and {claim.second} were not measured side by side in {results.folder}")
    order = ["refuted", "undecided", "supported"]
    worst = min(found, key=lambda one: (order.index(one.verdict), one.margin))
    lines = [f"{worst.verdict}: {worst.said}"]
    if len(found) > 1:
        counts = ", ".join(f"{sum(one.verdict == word for one in found)} {word}" for word in CODES)
        lines.append(f"the worst of {len(found)} settings: {counts}")
    rows = results.rows([claim.first, claim.second], claim.settings)
    machine = "; ".join(f"{key} {', '.join(map(str, rows[key].unique()))}" for key in ("processor", "torch") if key in rows)
    lines.append(f"{machine or 'machine unknown'}; {results.folder}")
    if worst.verdict == "undecided":
        lines.append(f"would decide it: {worst.decides}")
    return worst.verdict, "\n".join(lines).replace("\n", "\n  ")


def decide(claim: Claim, folders: Sequence[Path]) -> tuple[str, str]:
    """The verdict over all folders that measured what is claimed, and its evidence. Raises UsageError if none did."""
    known = [ResultFolder(folder) for folder in folders]
    named = [results for results in known if {claim.first, claim.second} - {""} <= set(results.names)]
    if not named:
        names = sorted({name for results in known for name in results.names})
        missing = [name for name in (claim.first, claim.second) if name and name not in names]
        what = f"{' and '.join(missing)} was not measured" if missing else f"{claim.first} and {claim.second} share no folder"
        raise UsageError(f"{what}; known are {', '.join(names) or 'no attentions, since there are no results'}")
    decided, errors = [], []
    for results in named:
        try:
            decided.append(evidence(results, claim))
        except UsageError as error:
            errors.append(error)
    if not decided:
        raise errors[0]
    order = ["refuted", "undecided", "supported"]
    return min(decided, key=lambda one: order.index(one[0]))


GLOBS = ("*/results.csv", "paper/*/results.csv")


CODES = {"supported": 0, "refuted": 1, "undecided": 3}
EXAMPLE = "bsbr 2x faster than standard at seq_len 4096"
