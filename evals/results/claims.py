"""Verdicts on claims: supported, refuted or undecided, with the evidence in result folders."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from evals.errors import UsageError
from evals.results.claim_grammar import Claim
from evals.results.folder import PAIRED, UNPAIRED, ResultFolder
from evals.stats.crossovers import Crossover, crossovers, crossovers_from_intervals
from evals.stats.intervals import Interval
from evals.stats.scaling import fit_scaling

VERDICTS = ("refuted", "undecided", "supported")
"""From the worst to the best: of several settings or folders the worst decides."""

SLACK, MARGIN = 0.05, 0.25
"""n^p is refuted if p is further than SLACK from the interval, and supported if all of the interval lies within MARGIN of p."""

SENTENCES = {
    "faster": "{first} runs at {ratio} the speed of {second}",
    "slower": "{first} takes {ratio} the time of {second}",
    "less": "{second} uses {ratio} the memory of {first}",
    "more": "{first} uses {ratio} the memory of {second}",
}


class Finding(NamedTuple):
    """The verdict at one setting."""

    verdict: str
    margin: float  # distance from being refuted; the smallest is the worst
    evidence: str
    missing: str = ""  # what would decide it, if it is undecided


class Decision(NamedTuple):
    """The verdict of a folder."""

    verdict: str
    text: str  # the lines to print


# --- decisions ------------------------------------------------------------------------------------


def decide(claim: Claim, folders: Sequence[Path]) -> Decision:
    """Decides a claim over all folders that measured its attentions; the worst verdict counts.

    Raises:
        UsageError: if no folder measured them; the message names the attentions that were measured.
    """
    known = [ResultFolder(folder) for folder in folders]
    naming = [results for results in known if claim.names <= set(results.names)]
    if not naming:
        names = sorted({name for results in known for name in results.names})
        missing = [name for name in (claim.first, claim.second) if name and name not in names]
        reason = f"{' and '.join(missing)} was not measured" if missing else f"{claim.first} and {claim.second} share no folder"
        raise UsageError(f"{reason}; known are {', '.join(names) or 'no attentions, since there are no results'}")
    decisions, errors = [], []
    for results in naming:
        try:
            decisions.append(decide_folder(claim, results))
        except UsageError as error:
            errors.append(error)
    if not decisions:
        raise errors[0]
    return min(decisions, key=lambda decision: VERDICTS.index(decision.verdict))


def decide_folder(claim: Claim, results: ResultFolder) -> Decision:
    """Decides a claim in one folder; the worst setting counts.

    Raises:
        UsageError: if the folder did not measure the claim's settings, or not its attentions side by side.
    """
    rows = results.select(claim.names, claim.settings)
    findings = judge_settings(claim, results, rows)
    if not findings:
        raise UsageError(f"{claim.first} and {claim.second} were not measured side by side in {results.folder}")
    worst = min(findings, key=lambda finding: (VERDICTS.index(finding.verdict), finding.margin))
    lines = [f"{worst.verdict}: {worst.evidence}"]
    if len(findings) > 1:
        counts = Counter(finding.verdict for finding in findings)
        summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("supported", "refuted", "undecided"))
        lines.append(f"the worst of {len(findings)} settings: {summary}")
    machine = "; ".join(f"{key} {', '.join(map(str, rows[key].unique()))}" for key in ("processor", "torch") if key in rows)
    lines.append(f"{machine}; {results.folder}")
    if worst.verdict == "undecided":
        lines.append(f"would decide it: {worst.missing}")
    return Decision(worst.verdict, "\n".join(lines).replace("\n", "\n  "))


def judge_settings(claim: Claim, results: ResultFolder, rows: pd.DataFrame) -> list[Finding]:
    """Returns a finding for each measured setting; for scaling and overtaking, for each range of lengths."""
    along_lengths = claim.relation in ("latency", "memory", "before", "after")
    settings = [name for name in results.settings if not (along_lengths and name == "seq_len")]
    judge: Callable[[Claim, ResultFolder, pd.DataFrame, str], Finding]
    judge = _judge_ratio if not along_lengths else _judge_overtaking if claim.second else _judge_scaling
    named = dict.fromkeys([*claim.settings, *(name for name in settings if rows[name].nunique() > 1)])
    findings = []
    for _, cell in rows.groupby(settings, dropna=False, sort=False):
        where = " and ".join(f"{name} {cell[name].iloc[0]}" for name in named)
        if claim.names <= set(cell["attention"]):
            findings.append(judge(claim, results, cell.sort_values("seq_len"), f" at {where}" if where else ""))
    return findings


# --- faster, slower, less, more -------------------------------------------------------------------


def _judge_ratio(claim: Claim, results: ResultFolder, cell: pd.DataFrame, where: str) -> Finding:
    ours, theirs = (cell[cell["attention"] == name].iloc[-1] for name in (claim.first, claim.second))
    of_memory = claim.relation in ("less", "more")
    column = "peak_bytes" if of_memory else "latency_s"
    for row in (ours, theirs):
        if row["outcome"] != "ok" or not row[column] > 0:
            reason = row["outcome"] if row["outcome"] != "ok" else f"no {column}"
            return Finding("undecided", -math.inf, f"{row['attention']} gave {reason}{where}", f"a measurement of it{where}")
    rounds = min(ours["rounds"], theirs["rounds"])
    if of_memory:
        value = theirs[column] / ours[column]
        ratio, method, floor = Interval(value, value, value), "peak memory is exact", 0.0
    else:
        (ratio, method), floor = results.speedup(ours, theirs), results.noise_floor(cell)
        method += f", {rounds:.0f} rounds; noise floor {_percent(floor)}"
    if claim.relation in ("slower", "more"):
        ratio = Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    verdict, missing = weigh(ratio, claim.amount, floor, rounds)
    claimed = f"{claim.amount:.4g}x" if claim.amount > 1 else "more than 1x"
    sentence = SENTENCES[claim.relation].format(first=claim.first, second=claim.second, ratio=f"{ratio.value:.4g}x")
    evidence = f"{sentence} ({ratio.low:.4g}x to {ratio.high:.4g}x){where}, claimed {claimed}\n{method}"
    return Finding(verdict, math.log(ratio.low / claim.amount), evidence, missing)


def weigh(ratio: Interval, claimed: float, floor: float, rounds: float) -> tuple[str, str]:
    """Weighs `ratio >= claimed`, or `ratio > 1` if `claimed` is 1.

    Args:
        ratio: the measured ratio.
        claimed: at least 1.
        floor: the noise floor, a fraction; a difference from 1 that is smaller cannot be seen.
        rounds: number of rounds behind the interval.

    Returns:
        The verdict, and what would decide it if it is undecided.
    """
    visible = math.expm1(abs(math.log(ratio.value))) > floor
    # A ratio below a claimed factor refutes the claim at any noise floor; a ratio below 1 only beyond the noise floor.
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


def _percent(floor: float) -> str:
    return "unknown" if math.isinf(floor) else f"{floor:.1%}"


# --- scales as ------------------------------------------------------------------------------------


def _judge_scaling(claim: Claim, results: ResultFolder, cell: pd.DataFrame, where: str) -> Finding:
    column = "peak_bytes" if claim.relation == "memory" else "latency_s"
    measured = [row for _, row in cell.iterrows() if row["outcome"] == "ok" and row[column] > 0]
    if not measured:
        return Finding("undecided", -math.inf, f"{claim.first} has no {column}{where}", "a measurement")
    lengths = [float(row["seq_len"]) for row in measured]
    rounds = [[row[column]] if claim.relation == "memory" else results.round_medians(row) for row in measured]
    fit = fit_scaling(lengths, rounds)
    subject = f"{claim.relation} of {claim.first}"
    where = f"over {len(lengths)} lengths, {min(lengths):g} to {max(lengths):g}{where}"
    if fit.note:
        return Finding("undecided", -math.inf, f"{subject} {where}: {fit.note}", "longer lengths, and more of them")
    low, value, high = fit.exponent.low, fit.exponent.value, fit.exponent.high
    outside = max(low - claim.amount, claim.amount - high)
    spread = max(high - claim.amount, claim.amount - low)
    verdict = "refuted" if outside > SLACK else "supported" if spread <= MARGIN else "undecided"
    evidence = f"{subject} grows as n^{value:.3f} ({low:.3f} to {high:.3f}) {where}, claimed n^{claim.amount:g}"
    return Finding(verdict, -spread, evidence, f"more lengths, until the interval lies within {MARGIN} of it")


# --- overtakes ------------------------------------------------------------------------------------

Row = pd.Series


class Crossings(NamedTuple):
    """The points where the latencies of two attentions cross."""

    crossings: list[Crossover]  # in ascending order of their lengths
    lead: float  # logarithm of how many times faster the first is at the longest length; below 0 if it is slower
    method: str  # PAIRED or UNPAIRED


class Overtaking(NamedTuple):
    """The range of lengths in which an attention becomes faster for good."""

    low: float
    high: float  # infinite if it is not faster at the longest length
    sentence: str


def _judge_overtaking(claim: Claim, results: ResultFolder, cell: pd.DataFrame, where: str) -> Finding:
    ok = cell[(cell["outcome"] == "ok") & cell["latency_low_s"].notna()]
    ours, theirs = (
        {row["seq_len"]: row for _, row in ok[ok["attention"] == name].iterrows()} for name in (claim.first, claim.second)
    )
    lengths = [length for length in ours if length in theirs]
    if len(lengths) < 2:
        return Finding("undecided", -math.inf, f"the two have fewer than 2 lengths in common{where}", "more lengths")
    crossings = _find_crossings(results, lengths, [ours[length] for length in lengths], [theirs[length] for length in lengths])
    overtaking = _locate_overtaking(claim, lengths, crossings)
    floor = results.noise_floor(cell)
    verdict, margin = _weigh_overtaking(claim, overtaking, crossings.lead, floor)
    method = f"{crossings.method}, {len(lengths)} lengths from {min(lengths):g} to {max(lengths):g}; noise floor {_percent(floor)}"
    missing = "more rounds, and lengths on both sides of where they cross"
    return Finding(verdict, margin, f"{overtaking.sentence}{where}\n{method}", missing)


def _find_crossings(results: ResultFolder, lengths: Sequence[float], ours: Sequence[Row], theirs: Sequence[Row]) -> Crossings:
    """Crossings from the paired rounds of the ledger; if rounds are missing, from the intervals in the table."""
    log_ratios = [results.log_ratios(*rows) for rows in zip(ours, theirs, strict=True)]
    if all(len(rounds) > 1 for rounds in log_ratios):
        return Crossings(crossovers(lengths, log_ratios), -float(np.mean(log_ratios[-1])), PAIRED)
    columns = ["latency_s", "latency_low_s", "latency_high_s"]
    first, second = ([Interval(*map(float, row[columns])) for row in rows] for rows in (ours, theirs))
    lead = math.log(second[-1].value / first[-1].value)
    return Crossings(crossovers_from_intervals(lengths, first, second), lead, UNPAIRED)


def _locate_overtaking(claim: Claim, lengths: Sequence[float], crossings: Crossings) -> Overtaking:
    """The last crossing, unless the first attention leads everywhere, or does not lead at the longest length."""
    shortest, longest = min(lengths), max(lengths)
    last = crossings.crossings[-1].at if crossings.crossings else None
    if crossings.lead < 0 and (last is None or last.high < math.inf):
        return Overtaking(longest, math.inf, f"{claim.first} is slower at {longest:g}, the longest measured")
    if last is None:
        return Overtaking(0.0, shortest, f"{claim.first} is faster at all lengths from {shortest:g} on")
    length = "some length" if math.isnan(last.value) else f"{last.value:.0f}"
    sentence = f"{claim.first} overtakes {claim.second} at {length} ({last.low:.0f} to {last.high:.0f})"
    return Overtaking(last.low, last.high, sentence)


def _weigh_overtaking(claim: Claim, overtaking: Overtaking, lead: float, floor: float) -> tuple[str, float]:
    """The verdict on overtaking before or after a length, and its margin."""
    before, after = overtaking.high <= claim.amount, overtaking.low >= claim.amount
    # It certainly overtakes if it is visibly faster at the longest length.
    overtakes = lead > 0 and overtaking.high < math.inf and math.expm1(lead) > floor
    if claim.relation == "before":
        holds, fails = before and overtakes, after and overtaking.low > 0
    else:
        holds, fails = after and overtakes, before and overtakes
    if holds:
        nearest = overtaking.high if before else overtaking.low
        return "supported", abs(math.log(claim.amount / nearest))
    return ("refuted" if fails else "undecided"), -math.inf
