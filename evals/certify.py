"""`python -m evals.certify`: does this attention do what an attention promises, before anyone times it?

Checks every variant in `conf/attention/`; `'attention=[bsbr]'` one; `--config-dir my/conf 'attention=[mine]'` one that
lives elsewhere. Shows a table, and for each red check what broke where. Exit code 1 if any is red. What runs only on a GPU
is unsupported, which is not red; `device=cuda` looks at it there.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig

from evals import cli, usage
from evals.checks import CHECKS, NEEDS_GRAD, Build, Subject
from evals.config import Comparison, Contestant, Model, one_sentence, read_comparison
from evals.measure import available_bytes
from evals.worker import Result, run_isolated

TIMEOUT_S = 300.0
"""A variant with the blocks that ship takes seconds; blocks of thousands of tokens, minutes."""


@dataclass(frozen=True)
class Finding:
    """One check's outcome: `detail` says what broke where, and is empty if nothing did."""

    check: str
    detail: str

    @property
    def passed(self) -> bool:
        return not self.detail


def certify(build: Build, device: str = "cpu", finest: torch.dtype = torch.float64) -> Iterator[Finding]:
    """Runs every check on what `build` makes, one finding after the other.

    Without a `reference` no one can know which function was meant. What stays certain then: it is causal, deaf to
    padding, the same streamed, batched and repeated, finite, its gradient is its slope, float32 keeps its precision, and
    its claims about cost are true. So an off-by-one window would pass, or a state that is a scalar product k·v.
    Raises NotImplementedError where a check does: what does not run here is neither right nor wrong.
    """
    subject = Subject(build, device, finest)
    for check in CHECKS:
        with one_thread(), torch.set_grad_enabled(check in NEEDS_GRAD):
            try:
                detail = check(subject) or ""
            except NotImplementedError:
                raise
            except Exception as error:  # noqa: BLE001  the subject is anybody's code: whatever it raises is a finding
                detail = f"raised {type(error).__name__}: {one_sentence(error)}"
        yield Finding(check.__name__, detail)


@contextmanager
def one_thread() -> Iterator[None]:
    """On a busy machine threads that share a small matrix product wait for each other far longer than it takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- the command --------------------------------------------------------------------------------


class Report:
    """Prints a row as soon as a variant is through; at the end, in words, what broke."""

    def __init__(self) -> None:
        self.objections: list[str] = []
        self.unsupported: list[str] = []

    def certify(self, cfg: DictConfig) -> None:
        """One Hydra job."""
        comparison = read_comparison(cfg)
        width = max(len(contestant.name) for contestant in comparison.contestants) + 2
        print(header(width))
        for contestant in comparison.contestants:
            print(f"{contestant.name:<{width}}", end="", flush=True)
            # Apart, because what is not certified may hang, crash or take all memory.
            result = certificate(contestant, comparison, int(0.8 * available_bytes()))
            if result.outcome == "ok":
                print("".join(f"{'✓' if finding.passed else '✗':<{COLUMN}}" for finding in result.value).rstrip())
                red = [f"{finding.check}: {finding.detail}" for finding in result.value if not finding.passed]
            else:
                print(result.outcome)
                red = [f"the certificate ended as {result.outcome}: {result.detail}"]
            told = [f"{contestant.name}, {objection}" for objection in red]
            if result.outcome == "unsupported":
                self.unsupported += told
            else:
                self.objections += told

    def conclude(self, _: DictConfig) -> int:
        if self.objections or self.unsupported:
            print("", *self.objections, *self.unsupported, sep="\n")
        return 1 if self.objections else 0


COLUMN, LINES = 5, 3


def header(width: int) -> str:
    """The checks' names, each over its column: in turn on one of three lines, since they are wider than their columns."""
    names = [check.__name__ for check in CHECKS]
    lines = []
    for line in range(LINES):
        columns = "".join(f"{name:<{COLUMN * LINES}}" for name in names[line::LINES])
        lines.append((" " * (width + COLUMN * line) + columns).rstrip())
    return "\n".join(lines)


def certificate(contestant: Contestant, comparison: Comparison, memory_limit_bytes: int) -> Result:
    """The findings, from a process apart: on the CPU in float64, or where its kernels run only on the comparison's GPU, there.

    There all checks are made in the comparison's precision, and see no error below its rounding. Not yet run on a GPU.
    """
    limits: dict[str, Any] = {"timeout_s": TIMEOUT_S, "memory_limit_bytes": memory_limit_bytes}
    result = run_isolated(findings, contestant, comparison.model, **limits)
    device = comparison.device
    if result.outcome == "unsupported" and device.kind != "cpu":
        result = run_isolated(findings, contestant, comparison.model, device.kind, device.torch_dtype, **limits)
    return result


def findings(contestant: Contestant, model: Model, device: str = "cpu", finest: torch.dtype = torch.float64) -> list[Finding]:
    return list(certify(partial(contestant.build, model), device, finest))


def main() -> int:
    asked, _ = usage.known(sys.argv[1:])
    if asked.help:
        print(usage.text_of_certify(str(__doc__), asked.config_dir))
        return 0
    report = Report()
    if not any(word.startswith("attention=") for word in sys.argv[1:]):
        known = ",".join(sorted(path.stem for path in (cli.CONF / "attention").glob("*.yaml")))
        sys.argv.append(f"attention=[{known}]")
    sys.argv.append("hydra.run.dir=.")  # Hydra makes the folder, and nothing will be written to it
    return cli.run(report.certify, report.conclude)


if __name__ == "__main__":
    # What a child is to call must be of a module with a name: of the imported one.
    from evals.certify import main as command

    sys.exit(command())
