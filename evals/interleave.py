"""Measures another commit of this repository in turns with the working tree, a round each, for `evals.compare --base`."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from evals.config import UsageError
from evals.machine import ROOT


def until(rounds: int) -> list[str]:
    """The options under which evals.run, started again, goes on to so many rounds and stops for no other reason."""
    return [f"sampling.min_rounds={rounds}", f"sampling.max_rounds={rounds}"]


GRACE_S = 20.0
"""After Ctrl-C a running round may take so long to end in good order."""

OURS = ("results_dir", "plots_dir", "sweep_name", *(option.partition("=")[0] for option in until(1)))
PACKAGES = ("bsbr", "baselines", "evals.run")
LOCATE = f"from importlib.util import find_spec as f; [print(n, getattr(f(n), 'origin', None)) for n in {PACKAGES}]"


def measure(rev: str, overrides: Sequence[str], rounds: int) -> tuple[Path, Path]:
    """Measures commit `rev` and the working tree in turns of one round each; returns the folders of both results."""
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
        print(f"results go to {folder}", file=sys.stderr)
        for number in range(1, rounds + 1):
            random.Random(f"{commit} {number}").shuffle(sides)
            for name, tree in sides:
                print(f"round {number}/{rounds}: {name}", file=sys.stderr)
                command = [
                    sys.executable,
                    "-m",
                    "evals.run",
                    *overrides,
                    *options,
                    f"sweep_name={folder.name}/{name}",
                    *until(number),
                ]
                _checked(command, tree, f"{name} cannot be measured")
    return folder / "base", folder / "here"


@contextlib.contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bsbr-base-") as folder:
        tree = Path(folder).resolve() / "base"
        try:
            _checked(["git", "worktree", "add", "--detach", "--quiet", str(tree), commit], ROOT, "the base cannot be checked out")
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True, check=False)


def _checked(command: Sequence[str], tree: Path, otherwise: str) -> str:
    """What a command says that imports its code from `tree`. Raises UsageError with its last words if it fails."""
    # Before an installed bsbr, and before what the user's own paths hold, comes the tree.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        # A session of its own: of Ctrl-C it hears from us, once, and its workers end with it.
        start = partial(subprocess.Popen[bytes], cwd=tree, env=environment, start_new_session=True)
        with start(command, stdout=said, stderr=complaints) as process:
            try:
                process.wait()
            except BaseException:
                process.send_signal(signal.SIGINT)
                try:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_S)
                finally:
                    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
                        os.killpg(process.pid, signal.SIGKILL)
                raise
        for file in (said, complaints):
            file.seek(0)
        if process.returncode:
            words = complaints.read().strip().splitlines()
            raise UsageError(": ".join([otherwise, *(" ".join(line.split()) for line in words[-1:])]))
        return said.read().strip()
