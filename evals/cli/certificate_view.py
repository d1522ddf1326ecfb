"""TODO: what lives here."""

from functools import partial

from omegaconf import DictConfig

from evals.certification.certificate import certify_isolated
from evals.certification.checks import CHECKS
from evals.cli.jobs import read_job
from evals.measure.memory import available_bytes

# --- the command --------------------------------------------------------------------------------


class Report:
    """Prints a row as soon as a variant is through; at the end, in words, what broke."""

    def __init__(self) -> None:
        self.objections: list[str] = []
        self.unsupported: list[str] = []

    def certify(self, cfg: DictConfig) -> None:
        """One Hydra job."""
        comparison = read_job(cfg)
        width = max(len(candidate.name) for candidate in comparison.candidates) + 2
        print(header(width))
        for candidate in comparison.candidates:
            print(f"{candidate.name:<{width}}", end="", flush=True)
            # Apart, because what is not certified may hang, crash or take all memory.
            result = certify_isolated(
                partial(candidate.build, comparison.model),
                comparison.device.kind,
                comparison.device.torch_dtype,
                int(0.8 * available_bytes()),
            )
            if result.outcome == "ok":
                print("".join(f"{'✓' if finding.passed else '✗':<{COLUMN}}" for finding in result.value).rstrip())
                red = [f"{finding.check}: {finding.detail}" for finding in result.value if not finding.passed]
            else:
                print(result.outcome)
                red = [f"the certificate ended as {result.outcome}: {result.detail}"]
            told = [f"{candidate.name}, {objection}" for objection in red]
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
