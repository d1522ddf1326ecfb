"""Measures another commit of this repository in turns with the working tree, for `evals.compare --base`."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from evals.errors import INCOMPLETE, UsageError
from evals.isolation.locks import BATON, exclusive_lock
from evals.paths import ROOT


def until(rounds: int) -> list[str]:
    """The options under which evals.run, started again, goes on to so many rounds and stops for no other reason."""
    return [f"sampling.min_rounds={rounds}", f"sampling.max_rounds={rounds}"]


GRACE_S = 20.0
"""After Ctrl-C a running round may take so long to end in good order."""

OURS = ("results_dir", "plots_dir", "sweep_name", *(option.partition("=")[0] for option in until(1)))
PACKAGES = ("bsbr", "baselines", "evals.run")
LOCATE = f"from importlib.util import find_spec as f; [print(n, getattr(f(n), 'origin', None)) for n in {PACKAGES}]"


def measure(rev: str, overrides: Sequence[str], rounds: int) -> tuple[Path, Path]:
    """Measures commit `rev` and the working tree, in turns of milliseconds; returns the folders of both results."""
    if rounds < 2:
        raise UsageError(f"--rounds must be at least 2, since it is between rounds that noise shows, got {rounds}")
    for word in overrides:
        if word.lstrip("+").partition("=")[0] in OURS:
            raise UsageError(f"{word} cannot be given with --base, which sets {', '.join(OURS)} itself; --rounds says how many")
    commit = _checked(["git", "rev-parse", "--verify", "--quiet", f"{rev}^{{commit}}"], ROOT, f"'{rev}' is no commit of {ROOT}")
    place = Path("results/compare")
    names = (f"{commit[:12]}-{number}" if number else commit[:12] for number in itertools.count())
    folder = next(place / name for name in names if not (place / name).exists())  # older results stay
    options = [f"{key}='{place.resolve()}'" for key in ("results_dir", "plots_dir")]  # and share their certificates
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that this ends in good order too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it starts in the background
    with _worktree(commit) as base:
        sides = [("base", base), ("here", ROOT)]
        for name, tree in sides:
            for line in _checked([sys.executable, "-c", LOCATE], tree, f"{name} cannot be measured").splitlines():
                package, _, origin = line.partition(" ")
                if not Path(origin).is_relative_to(tree):
                    raise UsageError(f"{name} cannot be measured: there is no {package} in it, python would take {origin}")
        if BATON not in (base / "evals" / "worker.py").read_text():
            raise UsageError(f"base cannot be measured: the harness of {rev} cannot take turns with another; compare two folders")
        print(f"results go to {folder}", file=sys.stderr)
        with exclusive_lock():
            _side_by_side(
                {
                    tree: [
                        sys.executable,
                        "-m",
                        "evals.run",
                        *overrides,
                        *options,
                        f"sweep_name={folder.name}/{name}",
                        *until(rounds),
                    ]
                    for name, tree in sides
                }
            )
    return folder / "base", folder / "here"


def _side_by_side(commands: dict[Path, list[str]]) -> None:
    """Runs a command in each of two trees; they take turns. Raises UsageError with the last words of one that fails."""
    pipes = os.pipe(), os.pipe()
    os.write(pipes[0][1], b".")  # the first begins
    ends = (pipes[0][0], pipes[1][1]), (pipes[1][0], pipes[0][1])
    with contextlib.ExitStack() as stack:
        running = []
        for (tree, command), own in zip(commands.items(), ends, strict=True):
            running.append(stack.enter_context(_Command(command, tree, own)))
        for end in itertools.chain(*pipes):
            os.close(end)  # ours: that of a command closes with it
        for one in running:
            one.finish(f"{'base' if one.tree != ROOT else 'here'} cannot be measured")


@contextlib.contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bsbr-base-") as folder:
        tree = Path(folder).resolve() / "base"
        try:
            _checked(["git", "worktree", "add", "--detach", "--quiet", str(tree), commit], ROOT, "the base cannot be checked out")
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True, check=False)


class _Command:
    """One that imports its code from `tree`, in a session of its own: of Ctrl-C it hears from us, once."""

    def __init__(self, command: Sequence[str], tree: Path, baton: tuple[int, int] | None = None) -> None:
        self.tree = tree
        # Before an installed bsbr, and before what the user's own paths hold, comes the tree.
        path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = os.environ | {"PYTHONPATH": path}
        if baton:
            environment[BATON] = f"{baton[0]},{baton[1]}"
        self._said, self._complaints = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115  closed at exit
        self._process = subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            stdout=self._said,
            stderr=self._complaints,
            pass_fds=baton or (),
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever still runs is let end in good order, and made to if it does not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
            with contextlib.suppress(ProcessLookupError):  # nothing is left of it
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._said.close()
        self._complaints.close()

    def finish(self, otherwise: str) -> str:
        """What it says until it ends. Raises UsageError with its last words if it fails."""
        self._process.wait()
        for file in (self._said, self._complaints):
            file.seek(0)
        if self._process.returncode not in (0, INCOMPLETE):
            words = self._complaints.read().strip().splitlines()
            raise UsageError(": ".join([otherwise, *(" ".join(line.split()) for line in words[-1:])]))
        return self._said.read().strip()


def _checked(command: Sequence[str], tree: Path, otherwise: str) -> str:
    with _Command(command, tree) as running:
        return running.finish(otherwise)
