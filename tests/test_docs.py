"""The examples of the documentation run, the commands on all pages compose, and directives are replaced by committed data."""

import importlib.util
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from markdown import markdown
from mkdocs.exceptions import PluginError

from evals.certification.checks import CHECKS
from evals.cli.jobs import read_job
from evals.errors import UsageError
from evals.paper.plan import plan
from evals.paths import CONF, ROOT
from evals.results import latency_table
from evals.results.frames import read_table
from evals.results.schema import VERSION, columns
from tests.evals.commands import typed

pytestmark = pytest.mark.xdist_group("docs")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.md"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the certificates that all pages share: they compare the same attentions, and certifying these takes longest."""
    return tmp_path_factory.mktemp("certificates") / "certificates.jsonl"


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_every_block_of_the_examples_runs(page: Path, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with a title is written to that file. Python blocks of a page share their names. Every command must succeed."""
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/certificates.jsonl").symlink_to(certificates)
    names: dict[str, object] = {}
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    for language, title, text in blocks:
        if title:
            Path(title).parent.mkdir(parents=True, exist_ok=True)
            Path(title).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, f"{page.name}: {text.strip().splitlines()[0]}", "exec"), names)
        else:
            assert language == "sh"
            for line in text.replace("\\\n", " ").splitlines():
                command, _, file = line.partition(" > ")
                words = subprocess.run(["bash", "-euc", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
                done = typed(*words.stdout.splitlines())
                assert (done.returncode, done.stderr) == (0, ""), f"{line}\n{done.stdout}\n{done.stderr}"
                if file:
                    Path(file).write_text(done.stdout, encoding="utf-8")


def commands() -> list[str]:
    """The arguments of every `python -m evals.run …` in the README, the pages and the study's recipe."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    lines = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ").splitlines()
    lines += plan([])[0] + plan(["device=cuda"])[0]
    return sorted({line.split("#")[0].removeprefix("python -m evals.run ").strip() for line in lines if COMMAND.match(line)})


COMMAND = re.compile(r"python -m evals\.run (?!.*(sweep=all|--config-dir|--help))")


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_pages_composes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting is known, and the first comparison can be measured, apart from a missing GPU."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("a text of the user's " * 10_000)
    arguments = [word for word in shlex.split(command) if not word.startswith("-")]
    if "launcher=ray" in arguments:
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="NOT TESTED: launcher=ray is not installed")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create()
        overrides = [first_value(override) for override in parser.parse_overrides(arguments)]
        given = {word.partition("=")[0] for word in overrides}
        params = swept_settings(*(word for word in overrides if word.startswith("sweep=")))
        swept = [f"{key}={value}" for key, value in params.items() if key not in given]
        overrides += [first_value(override) for override in parser.parse_overrides(swept)]
        config = compose("config", overrides)
    if config.device.kind == "cuda" and not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            read_job(config)
    else:
        assert read_job(config).candidates


@cache
def swept_settings(*sweep: str) -> dict[str, object]:
    """The settings that a sweep varies, with their values."""
    return dict(compose("config", [*sweep], return_hydra_config=True).hydra.sweeper.params or {})


def first_value(override: Override) -> str:
    """Returns an override with only the first of the values that it sweeps over."""
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


# --- docs/hooks.py --------------------------------------------------------------------------------


def loaded(name: str) -> ModuleType:
    """Imports docs/<name>.py by its path, as MkDocs does."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return loaded("hooks")


def test_a_number_on_a_page_is_the_one_in_the_results(hooks: ModuleType) -> None:
    results = pd.read_csv(ROOT / "results" / "paper" / "seq_len" / "results.csv")
    row = results[(results["attention"] == "linear") & (results["seq_len"] == 128)].iloc[0]
    assert hooks.on_page_markdown("at {{ value results/paper/seq_len linear 128 flops }} M") == f"at {row['flops'] / 1e6:.1f} M"
    table = hooks.on_page_markdown("{{ table results/paper/seq_len speedup }}")
    (line,) = [line for line in table.splitlines() if line.startswith("| linear |")]
    assert line.split("|")[2].strip().startswith(f"{row['speedup']:.2f}±")


def test_every_check_of_the_certificate_is_listed(hooks: ModuleType) -> None:
    lines = hooks.on_page_markdown("{{ checks }}").splitlines()
    assert lines[2:] == [f"| {check.name} | {check.description} |" for check in CHECKS]


def test_columns_are_listed_as_the_schema_describes_them(hooks: ModuleType) -> None:
    lines = hooks.on_page_markdown("{{ columns crossovers }}").splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == [*columns("crossovers"), VERSION]
    assert lines[2] == "| `first` |  | One attention. |"


@pytest.mark.parametrize(
    "directive",
    [
        "value results/paper/seq_len linear 129 flops",
        "table results/none speedup",
        "table results/paper/seq_len speed",
        "columns none",
        "finding sped",
        "figure sped",
        "fact 1",
    ],
)
def test_a_directive_without_data_ends_the_build(hooks: ModuleType, directive: str) -> None:
    with pytest.raises(PluginError, match=directive):
        hooks.on_page_markdown(f"{{{{ {directive} }}}}")


def test_a_figure_has_its_caption_and_the_recipe_is_complete(hooks: ModuleType) -> None:
    figure = hooks.on_page_markdown("{{ figure speedup }}")
    assert "](../plots/paper/speedup.svg)" in figure
    assert "config hash: " in figure
    assert plan([])[0] == [line for line in hooks.on_page_markdown("{{ recipe }}").splitlines() if line.startswith("python ")]


def test_formulas_become_mathml_and_other_dollars_stay(hooks: ModuleType) -> None:
    def html(text: str) -> str:
        return markdown(text, extensions=[hooks.Mathematics()])

    assert html("from $a_1$ to $b*c*d$").count("<math") == 2
    assert '<math display="block"' in html("$$\n\\frac{a}{b}\n$$").replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    assert "<math" not in html("`$a$`, from $5 to $6, and $HOME/$USER")
    with pytest.raises(PluginError, match="unknowable"):
        html(r"$\unknowable x$")


def test_the_quickstart_shows_the_committed_results() -> None:
    page = (ROOT / "docs" / "getting-started" / "quickstart.md").read_text(encoding="utf-8")
    results = read_table(ROOT / "results" / "paper" / "seq_len").assign(detail="")
    assert f"\n{latency_table.render(results)}\n" in page


def test_the_example_of_a_conversion_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "user-guide" / "pretrained.md").read_text(encoding="utf-8")
    (example,) = [text for language, _, text in BLOCK.findall(page) if language == "python" and "convert_to_bsbr(" in text]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)
    assert list(names["answer"].shape) == [1, 305]  # type: ignore[attr-defined]
    assert type(names["again"]) is type(names["converted"])
