"""The display of a sweep on a terminal and in a log, its final tables, `--help`, error messages and shell completion."""

import io
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from evals import run
from evals.benchmark import engine
from evals.benchmark.preflight import Preflight
from evals.cli import sweep
from evals.cli.jobs import read_job
from evals.errors import EXIT_CODES, INTERRUPTED, USAGE, UsageError
from evals.paths import CONF, ROOT
from evals.results import formatting, latency_table
from tests.evals import sweeps

ESCAPE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"


# --- a sweep at a terminal ------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal, its modes, and everything written to it."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.modes = termios.tcgetattr(device)
        self.output = ""


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, watch: Callable[[str], None] = lambda _: None) -> Iterator[Terminal]:
    """Makes a terminal of 80 columns the standard output and error; calls `watch` with everything written so far."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 80))
    screen = Terminal(theirs)

    def reads() -> None:
        data = b""
        while chunk := os.read(ours, 65536):
            data += chunk
            screen.output = data.decode(errors="ignore")
            watch(screen.output)
            if b"\0" in chunk:
                return

    reader = threading.Thread(target=reads)
    reader.start()
    with os.fdopen(os.dup(theirs), "w", buffering=1) as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", file)
        try:
            yield screen
        finally:
            monkeypatch.undo()
            os.write(theirs, b"\0")
            reader.join()
            os.close(theirs)
            os.close(ours)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("terminal")


@pytest.fixture(scope="module")
def words(folder: Path) -> list[str]:
    small = ("model.hidden_dim=32", "model.num_heads=2", "device.threads=1", "sampling.time_slices=2", "sampling.min_rounds=3")
    folders = (f"results_dir={folder / 'results'}", f"plots_dir={folder / 'plots'}")
    return ["run.py", "sweep=seq_len", "shape.seq_len=40,60", "attention=[standard,linear]", *small, *folders]


def test_a_terminal_shows_a_table_of_values_and_is_intact_after_ctrl_c(
    folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()

    def ctrl_c(written: str) -> None:
        if "[2/2] round 2" in written and not stopped.is_set():
            stopped.set()
            os.kill(os.getpid(), signal.SIGINT)

    with terminal(monkeypatch, ctrl_c) as screen:
        ours = sys.stdout
        monkeypatch.setattr(sys, "argv", [*words, "sampling.max_rounds=3"])
        assert run.main() == INTERRUPTED
        assert sys.stdout is sys.stderr is ours
        assert termios.tcgetattr(screen.device) == screen.modes
    written = screen.output
    # The cursor is never left hidden, not even during a round: a killed command cannot show it again.
    assert written.count(HIDDEN) == 2
    assert all(part.startswith("\x1b[?25h") for part in written.split(HIDDEN)[1:])
    plain = ESCAPE.sub("", written).replace("\r\n", "\n").replace("\r", "\n")  # a drawing begins where the one before began
    assert "stops after this round; Ctrl-C again stops at once" in plain
    assert "interrupted; what was measured is kept" in plain
    assert "[1/2] certifying, and measuring memory" in plain
    first, second = plain[plain.index("[1/2] round 3") : plain.index("latency in ms")].split("[2/2] seq_len=60: prefill")
    assert re.search(r"\[2/2\] round 2 +━.* \d:\d\d:\d\d", second)
    rows = pd.read_csv(folder / "results" / "seq_len" / "results.csv").set_index(["attention", "seq_len"])
    for length, part, note in ((40, first, "3 rounds, ended by rounds"), (60, second, "2 rounds")):
        frame = part[part.rindex("attention ") :].splitlines()
        assert frame[0].split() == ["attention", "ms", "speed-up", "peak", "MiB"]
        for line, name in zip(frame[1:], ("standard", "linear"), strict=False):
            attention, latency, speedup, peak = line.split()
            row = rows.loc[(name, length)]
            assert attention == name
            assert latency.split("±")[0] == formatting.format_value(row, latency_table.TABLE_METRICS[0]).split("±")[0]
            assert speedup.split("±")[0] == formatting.format_value(row, latency_table.TABLE_METRICS[1]).split("±")[0]
            assert ("±" in latency, "±" in speedup) == (True, name != "standard")
            assert peak == formatting.format_value(row, latency_table.TABLE_METRICS[2])
        assert re.fullmatch(rf"  {note}; noise: standard over itself [\d.]+±>?\d+%", frame[3].rstrip())
    assert all(len(line.rstrip()) <= 80 for line in plain.splitlines() if str(folder) not in line)


def test_quiet_prints_the_final_tables_only(
    folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*words, "sampling.max_rounds=3", "quiet=true"])
    assert run.main() == 0
    written, complaints = capfd.readouterr()
    assert complaints == ""
    assert written.startswith("latency in ms, lower is better\n")
    assert "\x1b" not in written
    assert "\r" not in written


def test_a_complete_sweep_prints_a_notice_and_its_tables(
    folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*words, "sampling.max_rounds=3"])
    assert run.main() == 0
    first = capfd.readouterr().out
    monkeypatch.setattr(Preflight, "run", lambda *_: pytest.fail("it certifies again"))
    monkeypatch.setattr(engine, "run_isolated", lambda *_, **__: pytest.fail("it measures the machine again"))
    assert run.main() == 0
    sentence, empty, *rest = capfd.readouterr().out.splitlines()
    assert sentence == f"Nothing is left to measure: {folder / 'results' / 'seq_len'} holds all 2 comparisons."
    assert empty == ""
    assert first[first.index("latency in ms") :].splitlines()[: len(rest)] == rest


# --- the summary ----------------------------------------------------------------------------------


def test_long_names_many_variants_and_many_values_fit_80_columns() -> None:
    names = ("standard", "bsbr", *(f"bsbr_top_{2**power}_of_a_linear_feature_map_with_mean_scale" for power in range(6)))
    lengths = tuple(2**power for power in range(7, 17))
    text = latency_table.render(sweeps.table(names, lengths).assign(detail="", sent_bytes=float("nan")))
    assert max(map(len, text.splitlines())) <= 80
    latencies = text[: text.index("speed-up over")]
    assert re.findall(r"\d+", " ".join(re.findall(r"^seq_len(.*)$", latencies, flags=re.MULTILINE))) == list(map(str, lengths))
    for name in names:
        figures = " ".join(re.findall(rf"^{name} (.*)$", latencies, flags=re.MULTILINE)).split()
        assert len(figures) == len(lengths)


def test_a_very_long_name_loses_its_middle() -> None:
    text = formatting.align_columns(["", "a" * 60 + "b" * 60], [["ms", "1.00±12%"]])
    assert re.search(r"^a{30,}…b{30,} 1.00±12%$", text, flags=re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 80


# --- exit codes, help -----------------------------------------------------------------------------


def test_every_exit_code_is_documented_as_in_the_help() -> None:
    page = (ROOT / "docs" / "user-guide" / "sweeps.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| (\d+) \| (.*) \|$", page, flags=re.MULTILINE))
    assert {int(code): meaning.replace("`", "") for code, meaning in documented.items()} == EXIT_CODES


@pytest.mark.parametrize(
    ("codes", "code", "runs"), [([0, 3, 0, 0], 3, 4), ([0, 0, 0, 0], 0, 4), ([0, 3, 2, 0], 2, 3), ([130, 0, 0, 0], 130, 1)]
)
def test_many_sweeps_continue_after_a_failed_row_and_stop_at_any_error(
    codes: list[int], code: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []

    def run_one(*_: object, **__: object) -> int:
        begun.append(sys.argv[1:])
        code = codes[len(begun) - 1]
        if code == USAGE:
            raise UsageError("no")
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code

    monkeypatch.setattr(sweep.hydra_app, "run", run_one)
    monkeypatch.setattr(sweep, "expand_sweep_all", lambda words: [[f"sweep={name}", *words] for name in "abcd"])
    monkeypatch.setattr(sys, "argv", ["run.py", "sampling=quick"])
    assert run.main() == code
    assert begun == [[f"sweep={name}", "sampling=quick"] for name in "abcd"[:runs]]


@pytest.fixture
def help_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["run.py", "--help"])
    assert run.main() == 0
    return capsys.readouterr().out


def test_help_lists_everything_in_conf_in_80_columns(help_page: str) -> None:
    assert max(map(len, help_page.splitlines())) <= 80
    for path in (CONF / "sweep").glob("*.yaml"):
        (line,) = re.findall(rf"^  {path.stem} +\S.*$", help_page, flags=re.MULTILINE)
        assert re.search(rf"# ?{re.escape(line.split(maxsplit=1)[1])}", path.read_text(encoding="utf-8"))
    joined = " ".join(help_page.split())
    for group in {path.parent for path in CONF.glob("*/*.yaml")} - {CONF / "sweep"}:
        assert re.search(rf" {group.name}= .*?: {', '.join(sorted(path.stem for path in group.glob('*.yaml')))} ", joined)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [])
    for group in ("shape", "model", "device", "sampling", "training"):
        for key in cfg[group]:
            assert f" {group}.{key}=" in joined
    assert all(f" {key}=" in joined for key in cfg)


def test_the_examples_of_help_are_valid(help_page: str) -> None:
    commands = re.findall(
        r"^  python -m evals.run (.*)$", help_page[help_page.index("Examples") :].replace("\\\n", ""), flags=re.MULTILINE
    )
    assert len(commands) >= 3
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for command in commands:
            overrides = [re.sub(r"=(\d+),.*", r"=\1", word) for word in shlex.split(command) if word != "-m"]
            assert read_job(compose("config", overrides)).candidates


def test_help_lists_the_user_s_own_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text("# @package _global_\n# Over what I like. And more.\nsweep_name: mine\n")
    monkeypatch.setattr(sys, "argv", ["run.py", "--config-dir", str(tmp_path), "-h"])
    assert run.main() == 0
    assert re.search(r"^  mine +Over what I like\.$", capsys.readouterr().out, flags=re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["run.py", "--config-dir", str(tmp_path / "nowhere"), "--help"])
    assert run.main() == 2
    assert capsys.readouterr().err.startswith("error: --config-dir must name a folder")


# --- mistakes of a beginner -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("sweep=seqlen", r"unknown sweep 'seqlen' \(did you mean seq_len\?\); known are all, .*"),
        ("seq_len=128", r".*'seq_len': there is no such setting \(did you mean shape.seq_len\?\); --help lists them"),
        ("shape.seqlen=128", r".*'shape.seqlen': there is no such setting \(did you mean shape.seq_len\?\); --help lists them"),
        ("sampling.budget=1", r".* \(did you mean sampling.budget_s\?\); --help lists them"),
        ("attention.bsbr.chunksize=64", r".* its YAML does not name \(did you mean attention.bsbr.chunk_size\?\); \+attention.*"),
        ("attention.linear_fla.chunk_size=3", r".*linear_fla is not among those selected by attention=\[standard,bsbr,.*"),
        ("sweep=seq_len attention=bsbr,standard", r".* alone: to compare them, say 'attention=\[bsbr,standard\]'"),
        ("shape.seq_len=128,256", r"shape.seq_len=128,256 is several values: with -m they are a sweep, and .*"),
        ("sweep seq_len", r"'sweep' is no setting: settings are given as key=value, such as sweep=seq_len"),
        (
            "--dryrun sweep=seq_len",
            r"unknown option --dryrun \(did you mean --dry-run\?\); settings are .* --help lists the options",
        ),
        ("quiet=yes", r"quiet must be true or false, got 'yes'"),
        ("figures=no_report", r"figures must be true or false, got 'no_report'"),
        (
            "--config-dir {conf} attention=[no_name]",
            r"a file of attention/ holds one key, .* _target_: beside.Cosine stands at the top",
        ),
        ("--config-dir {conf} attention=[misspelt]", r".*: module beside has no Cosin \(did you mean Cosine\?\)"),
        (
            "--config-dir {conf} attention=[elsewhere]",
            r".*: module besides cannot be imported: .*; a module of your own lies in .*",
        ),
    ],
)
def test_a_beginner_s_mistake_gets_one_helpful_sentence(
    arguments: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "conf"
    (conf / "attention").mkdir(parents=True)
    (tmp_path / "beside.py").write_text("class Cosine: ...\n")
    (conf / "attention" / "no_name.yaml").write_text("_target_: beside.Cosine\n")
    (conf / "attention" / "misspelt.yaml").write_text("misspelt: {_target_: beside.Cosin}\n")
    (conf / "attention" / "elsewhere.yaml").write_text("elsewhere: {_target_: besides.Cosine}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run.py", f"results_dir={tmp_path}", *arguments.format(conf=conf).split()])
    assert run.main() == 2
    output, error = capfd.readouterr()
    assert output == ""
    assert re.fullmatch(f"error: {sentence}\n", error)


# --- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("python -m evals.run sweep=seq", ["sweep=seq_len"]),
        ("python -m evals.run --dry-run sweep=seq_len model.num_", ["model.num_heads=", "model.num_layers="]),
        ("python -m evals.certify attention=sparse", ["attention=sparse", "attention=sparse_flex"]),
        ("python -m http.server sweep=seq", []),
        ("bsbr c", ["certify", "claim", "compare", "context-parallel"]),
        ("bsbr certify attention=sparse", ["attention=sparse", "attention=sparse_flex"]),
        ("bsbr claim sweep=seq", []),
    ],
)
def test_bash_completes_settings(line: str, completed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = line.partition(" ")[0]
    program = tmp_path / name  # as where the command is installed
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {"-m bsbr" if name == "bsbr" else ""} "$@"\n')
    program.chmod(0o755)
    completion = io.StringIO()
    monkeypatch.setattr(sys, "stdout", completion)
    monkeypatch.setattr(sys, "argv", ["run.py", "-sc", "install=bash"])
    assert run.main() == 0
    # Calls the function that `complete -p` names, with the variables that bash sets.
    script = f"""{completion.getvalue()}
    COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDS=({shlex.quote(str(program))})
    $(complete -p {name} | sed 's/.*-F \\([^ ]*\\) {name}/\\1/')
    printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == completed
