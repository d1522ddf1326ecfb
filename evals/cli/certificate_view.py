"""The table that `evals.certify` prints: one row an attention, one column a check, and the failures below it."""

from functools import partial

from omegaconf import DictConfig

from evals.certification.certificate import Finding, badge, certify_isolated
from evals.certification.checks import CHECKS
from evals.cli.hydra_app import JobConfig
from evals.cli.jobs import read_job
from evals.errors import OK
from evals.isolation.worker import Result
from evals.measure.memory import available_bytes

COLUMN_WIDTH, HEADER_LINES = 4, 4


class CertificateView:
    """Certifies the attentions of a Hydra job, prints a row as soon as each is done, and the failures at the end."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.unsupported: list[str] = []
        self.badges: dict[str, str] = {}

    def certify(self, job: JobConfig) -> None:
        """Certifies every attention of one Hydra job."""
        comparison = read_job(job.cfg, job.varied)
        width = max(len(candidate.name) for candidate in comparison.candidates) + 2
        print(header(width))
        for candidate in comparison.candidates:
            print(f"{candidate.name:<{width}}", end="", flush=True)
            build, device = partial(candidate.build, comparison.model), comparison.device
            result = certify_isolated(build, device.kind, device.torch_dtype, int(0.8 * available_bytes()))
            print(row(result.value) if result.outcome == "ok" else result.outcome)
            if result.outcome == "ok":
                self.badges[candidate.name] = badge(result.value)
            messages = self.unsupported if result.outcome == "unsupported" else self.failures
            messages += [f"{candidate.name}, {failure}" for failure in failures(result)]

    def conclude(self, _: DictConfig) -> int:
        """Prints all failures, and a line to quote for each certificate; returns the exit code.

        An attention that this machine cannot run is not a failure.
        """
        if self.failures or self.unsupported:
            print("", *self.failures, *self.unsupported, sep="\n")
        print("", *(f"{name}, {line}" for name, line in self.badges.items()), sep="\n")
        return 1 if self.failures else OK


def failures(result: Result[list[Finding]]) -> list[str]:
    """The failed checks of a certificate, or the reason why there is no certificate."""
    if result.outcome == "ok":
        return [str(finding) for finding in result.value if not finding.passed]
    return [f"the certificate ended as {result.outcome}: {result.detail}"]


def header(width: int) -> str:
    """Names of the checks above their columns, spread over several lines because they are wider than the columns.

    width: of the column of names, in characters.
    """
    names = [check.name for check in CHECKS]
    lines = []
    for line in range(HEADER_LINES):
        columns = "".join(f"{name:<{COLUMN_WIDTH * HEADER_LINES}}" for name in names[line::HEADER_LINES])
        lines.append((" " * (width + COLUMN_WIDTH * line) + columns).rstrip())
    return "\n".join(lines)


def row(findings: list[Finding]) -> str:
    """One mark a check."""
    return "".join(f"{'✓' if finding.passed else '✗':<{COLUMN_WIDTH}}" for finding in findings).rstrip()
