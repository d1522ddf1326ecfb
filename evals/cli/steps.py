"""Steps of a check: commands that run one after the other with a time limit each, and the Markdown table of their outcomes."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evals.isolation.scratch import scratch_folder
from evals.measure.clock import Stopwatch

PASSED, FAILED, UNSUPPORTED = OUTCOMES = ("passed", "failed", "unsupported")


class Verdict(NamedTuple):
    """What a step has shown."""

    outcome: str  # one of OUTCOMES
    detail: str  # a figure, or the reason


Judge = Callable[[int, str], Verdict]
"""Decides from the exit code and the output of a step's command."""


def by_exit_code(code: int, output: str) -> Verdict:
    """Passed if the exit code is 0; the detail is the last line of the output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return Verdict(FAILED if code else PASSED, lines[-1] if lines else f"exit code {code}, without output")


@dataclass(frozen=True)
class Step:
    """One command of a check."""

    name: str
    command: Sequence[str]
    limit_s: float
    judge: Judge = by_exit_code
    missing: str = ""  # why it cannot run here; empty if it can


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    step: str
    verdict: Verdict
    seconds: float


def run_steps(steps: Sequence[Step], budget_s: float) -> Iterator[Outcome]:
    """Runs the steps in order, each in a process group of its own, and yields each outcome as soon as it is known.

    A step that fails, or that is killed at its limit, does not keep the next from running.

    Args:
        steps: the steps.
        budget_s: seconds for all of them; a step is killed when they are over, and later ones do not start.
    """
    whole = Stopwatch()
    for step in steps:
        watch = Stopwatch()
        limit_s = min(step.limit_s, budget_s - whole.seconds())
        if step.missing:
            verdict = Verdict(UNSUPPORTED, step.missing)
        elif limit_s <= 0:
            verdict = Verdict(FAILED, f"was not started: the {budget_s:g} s of the whole check were over")
        else:
            verdict = _run(step, limit_s)
        yield Outcome(step.name, verdict, watch.seconds())


def _run(step: Step, limit_s: float) -> Verdict:
    # A file, and no pipe: processes that outlive the command would keep a pipe open.
    with tempfile.NamedTemporaryFile(dir=scratch_folder(), prefix="step-") as log:
        process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return Verdict(FAILED, f"took longer than {limit_s:.3g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return step.judge(code, Path(log.name).read_text(errors="replace"))


def markdown(title: str, outcomes: Sequence[Outcome], facts: Mapping[str, object]) -> str:
    """The outcomes and the facts of the machine as Markdown, ready to be pasted into an issue."""
    counts = [f"{sum(one.verdict.outcome == outcome for one in outcomes)} {outcome}" for outcome in OUTCOMES]
    rows = [(one.step, one.verdict.outcome, f"{one.seconds:.0f}", one.verdict.detail) for one in outcomes]
    known = [(name, value) for name, value in facts.items() if value not in (None, "")]
    return "\n".join(
        [
            f"### {title}: {', '.join(counts)}",
            "",
            *_table(("step", "outcome", "s", "detail"), rows),
            "",
            *_table(("machine", ""), known),
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(" ".join(str(value).replace("|", "\\|").split()) for value in row) + " |"
