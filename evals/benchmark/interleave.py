"""Measures another commit of this repository, interleaved with the working tree: `evals.compare --base`."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from evals.errors import INCOMPLETE, UsageError
from evals.isolation.locks import LOCK_PIPES, end_round, exclusive_lock
from evals.isolation.scratch import PREFIX, scratch_folder
from evals.paths import ROOT

GRACE_S = 20.0
"""Seconds that a running round has after Ctrl-C, to end in good order."""

SET_BY_US = ("results_dir", "plots_dir", "sweep_name", "sampling.min_rounds", "sampling.max_rounds", "figures")
PACKAGES = ("bsbr", "baselines", "evals.run")
LOCATE = f"from importlib.util import find_spec as f; [print(n, getattr(f(n), 'origin', None)) for n in {PACKAGES}]"
LOCKS = Path("evals/isolation/locks.py")


class Side(NamedTuple):
    """One of the two source trees that are compared: `base`, the other commit, or `here`, the working tree."""

    name: str
    tree: Path


def measure(revision: str, overrides: Sequence[str], rounds: int) -> tuple[Path, Path]:
    """Measures a commit and the working tree in alternating time slices.

    Args:
        revision: names the commit, such as HEAD~1.
        overrides: settings for evals.run.
        rounds: of each side.

    Returns:
        The result folders of the commit and of the working tree.

    Raises:
        UsageError: for arguments that cannot be measured this way, or with the last line that a failed command printed.
    """
    if rounds < 2:
        raise UsageError(f"--rounds must be at least 2, since it is between rounds that noise shows, got {rounds}")
    for word in overrides:
        if word.lstrip("+").partition("=")[0] in SET_BY_US:
            raise UsageError(
                f"{word} cannot be given with --base, which sets {', '.join(SET_BY_US)} itself; --rounds says how many"
            )
    verify = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    commit = _run_checked(verify, ROOT, f"'{revision}' is no commit of {ROOT}")
    folder = _new_folder(commit[:12])
    # Both sides write to one folder, so that they share certificates. They stop after exactly so many rounds.
    options = [f"{key}='{folder.parent.resolve()}'" for key in ("results_dir", "plots_dir")]
    options += [f"sampling.min_rounds={rounds}", f"sampling.max_rounds={rounds}", "figures=false"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed then, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
    with _worktree(commit) as tree:
        sides = (Side("base", tree), Side("here", ROOT))
        for side in sides:
            _check_packages(side)
        if not (tree / LOCKS).exists() or end_round.__name__ not in (tree / LOCKS).read_text(encoding="utf-8"):
            raise UsageError(
                f"base cannot be measured: the harness of {revision} cannot interleave its measurements with those of another "
                "command; measure both commits by themselves, and compare the two folders"
            )
        print(f"results go to {folder}", file=sys.stderr)
        run = [sys.executable, "-m", "evals.run", *overrides, *options]
        with exclusive_lock():
            _run_side_by_side({side: [*run, f"sweep_name={folder.name}/{side.name}"] for side in sides})
    return folder / "base", folder / "here"


def _new_folder(name: str) -> Path:
    """The first of results/compare/<name>, <name>-1, … that does not exist: older results stay."""
    names = (f"{name}-{number}" if number else name for number in itertools.count())
    return next(folder for folder in map(Path("results/compare").joinpath, names) if not folder.exists())


def _check_packages(side: Side) -> None:
    """Raises UsageError if Python, started in a tree, would import a package from elsewhere."""
    for line in _run_checked([sys.executable, "-c", LOCATE], side.tree, f"{side.name} cannot be measured").splitlines():
        package, _, origin = line.partition(" ")
        if not Path(origin).is_relative_to(side.tree):
            raise UsageError(f"{side.name} cannot be measured: there is no {package} in it, python would take {origin}")


def _run_side_by_side(commands: dict[Side, list[str]]) -> None:
    """Runs one command per side at the same time; they share the lock. Raises UsageError if one fails."""
    (first_reads, second_writes), (second_reads, first_writes) = os.pipe(), os.pipe()
    os.write(second_writes, b".")  # the first command has the lock to begin with
    ends = [(first_reads, first_writes), (second_reads, second_writes)]
    with contextlib.ExitStack() as stack:
        running = {
            side: stack.enter_context(_Command(command, side.tree, pipes))
            for (side, command), pipes in zip(commands.items(), ends, strict=True)
        }
        for end in itertools.chain(*ends):
            os.close(end)  # our copies: a command's ends must close with it
        for side, command in running.items():
            command.finish(f"{side.name} cannot be measured")


@contextlib.contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    """A git worktree of a commit, which is removed at the end."""
    tree = scratch_folder().resolve() / "base"
    for line in _run_checked(["git", "worktree", "list", "--porcelain"], ROOT, "the worktrees cannot be listed").splitlines():
        known = Path(line.removeprefix("worktree "))
        if known.name == tree.name and known.parent.name.startswith(PREFIX) and not known.exists():  # of a killed command
            _remove_worktree(known)
    try:
        add = ["git", "worktree", "add", "--detach", "--quiet", str(tree), commit]
        _run_checked(add, ROOT, "the base cannot be checked out")
        yield tree
    finally:
        _remove_worktree(tree)


def _remove_worktree(tree: Path) -> None:
    subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True, check=False)


class _Command:
    """A command that imports its code from `tree`. Leaving its context ends it: by Ctrl-C, and by force if that takes too long.

    It runs in a new session, so that a Ctrl-C in the terminal reaches it only once, from here.
    """

    def __init__(self, command: Sequence[str], tree: Path, lock_pipes: tuple[int, int] | None = None) -> None:
        # The tree comes before an installed bsbr, and before the user's PYTHONPATH.
        path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = os.environ | {"PYTHONPATH": path}
        if lock_pipes:
            environment[LOCK_PIPES] = f"{lock_pipes[0]},{lock_pipes[1]}"
        self._output, self._errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115  closed at exit
        self._process = subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            stdout=self._output,
            stderr=self._errors,
            pass_fds=lock_pipes or (),
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
            with contextlib.suppress(ProcessLookupError):  # nothing of its session is left
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()
        self._errors.close()

    def finish(self, failure: str) -> str:
        """Waits for the end; returns the output. Raises UsageError with `failure` and its last line of errors if it fails."""
        self._process.wait()
        for file in (self._output, self._errors):
            file.seek(0)
        if self._process.returncode not in (0, INCOMPLETE):
            lines = self._errors.read().strip().splitlines()
            raise UsageError(": ".join([failure, *(" ".join(line.split()) for line in lines[-1:])]))
        return self._output.read().strip()


def _run_checked(command: Sequence[str], tree: Path, failure: str) -> str:
    with _Command(command, tree) as running:
        return running.finish(failure)
