"""Every sweep in conf/, and the messages for configs that cannot be measured."""

import re
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from evals.benchmark.cost import candidate_costs
from evals.benchmark.matching import count_layer_parameters
from evals.cli.jobs import expand_sweep_all, read_job
from evals.config import Comparison
from evals.errors import UsageError
from evals.isolation.affinity import core_count
from evals.paths import CONF
from evals.results.schema import schema
from evals.results.unmatched import unmatched_costs
from evals.training.tasks.build import build_task

pytestmark = pytest.mark.xdist_group("sweeps")
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))
LEARNED = (
    "language_modeling",
    "length_extrapolation",
    "needle",
    "retrieval",
    "recall",
    "recall_length",
    "recall_sizes",
    "token_retrieval",
)  # left out of sweep=all: they take hours
EXTRA = ("conversion",)  # left out of sweep=all: it needs the extra `convert`
SMALL = ("model.hidden_dim=32", "model.num_heads=2", "model.ff_dim=64", "shape.seq_len=40")


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", [*overrides], return_hydra_config=True)


@cache
def read(*overrides: str) -> Comparison:
    return read_job(compose("config", [*overrides]))


# --- sweeps -------------------------------------------------------------------------------------


@cache
def jobs(name: str) -> list[list[str]]:
    """The overrides of each of the sweep's jobs, as Hydra's sweeper derives them from its parameters."""
    params = composed(f"sweep={name}").hydra.sweeper.params or {}
    if not params:
        return [[f"sweep={name}"]]
    (only,) = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return [[f"sweep={name}", f"{only.get_key_element()}={value}"] for value in only.sweep_string_iterator()]


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "all"])
def test_every_job_of_a_sweep_is_a_different_comparison(name: str) -> None:
    comparisons = [read(*overrides) for overrides in jobs(name)]
    assert {comparison.sweep for comparison in comparisons} == {name}
    for comparison in comparisons:
        assert comparison.relative_to in {candidate.name for candidate in comparison.candidates}
    values = [tuple(comparison.option.values()) for comparison in comparisons]
    assert len(set(values)) == len(values)
    if name != "max_context":
        assert len(values) >= (1 if name in ("threads", "context_parallel", *LEARNED) else 2)
        assert len({comparison.swept for comparison in comparisons}) == 1
        assert next(iter(comparisons[0].option)) in comparisons[0].settings


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "all"])
def test_every_setting_is_a_column_that_the_schema_knows(name: str) -> None:
    comparison = read(*jobs(name)[0])
    kind = "accuracy" if comparison.task else "max_context" if comparison.search else "latency"
    columns = {*comparison.settings} | ({*build_task(comparison).extra_settings()} if comparison.task else set())
    assert columns - ({"seq_len"} if comparison.search else set()) <= {*schema(kind)["properties"]}


def test_sweep_all_runs_every_other_sweep_in_its_folder() -> None:
    commands = expand_sweep_all(["attention=[bsbr]", "sweep=all", "sampling=quick"])
    assert sorted(words[1] for words in commands) == sorted(
        f"sweep={name}" for name in SWEEPS if name not in ("all", *LEARNED, *EXTRA)
    )
    assert all((words[0], words[2]) == ("attention=[bsbr]", "sampling=quick") for words in commands)
    folders = [composed(words[1]).sweep_name for words in commands]
    assert len(set(folders)) == len(folders)
    assert expand_sweep_all(["sweep=seq_len"]) == [["sweep=seq_len"]]


def test_a_sweep_of_sizes_varies_one_size_and_keeps_the_others() -> None:
    def sizes(name: str) -> set[tuple[int, int, int]]:
        models = [read(*overrides).model for overrides in jobs(name)]
        return {(model.hidden_dim, model.num_heads, model.hidden_dim // model.num_heads) for model in models}

    assert {hidden for hidden, _, _ in sizes("num_heads")} == {256}
    assert {heads for _, heads, _ in sizes("head_dim")} == {4}
    assert {dim for _, _, dim in sizes("hidden_dim")} == {64}
    for name, place in (("num_heads", 1), ("head_dim", 2), ("hidden_dim", 0)):
        assert len({size[place] for size in sizes(name)}) == len(jobs(name))


def test_threads_go_up_to_the_number_of_cores() -> None:
    threads = [read(*overrides).device.threads for overrides in jobs("threads")]
    assert threads[0] == 1
    assert threads[-1] == core_count()
    assert threads == sorted(set(threads))


def test_the_command_line_overrides_a_sweep() -> None:
    comparison = read("sweep=train", "model.scope=model", "workload=forward_backward", "attention=[standard,gau]")
    assert comparison.model.scope == "model"
    assert comparison.settings["workload"] == "forward_backward"
    assert [candidate.name for candidate in comparison.candidates] == ["standard", "gau"]


@pytest.mark.parametrize(
    ("scope", "added"),
    [
        ("attention", set()),
        ("layer", {"ff_dim"}),
        ("model", {"ff_dim", "num_layers", "vocab_size"}),
    ],
)
def test_settings_depend_on_the_scope(scope: str, added: set[str]) -> None:
    shared = {"workload", "device", "dtype", "threads", "batch_size", "seq_len", "scope", "hidden_dim", "num_heads"}
    assert set(read(f"model.scope={scope}").settings) == shared | added


# --- the same number of parameters --------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_matched_parameters_are_equal_and_the_rest_is_named(scope: str) -> None:
    names = "attention=[standard,bsbr,gau,linear]"
    plain, comparison = (read(f"model.scope={scope}", names, *match) for match in ([], ["match=params"]))
    plain_costs, costs = ({one.name: candidate_costs(job, one) for one in job.candidates} for job in (plain, comparison))
    assert costs["standard"]["ff_dim"] == 1024
    assert costs["gau"]["ff_dim"] < costs["bsbr"]["ff_dim"] < costs["linear"]["ff_dim"] == 1024
    for cost in costs.values():
        assert cost["parameter_bytes"] == pytest.approx(costs["standard"]["parameter_bytes"], rel=0.01)
    assert comparison.settings["match"] == "params"
    assert [words.split()[0] for words in unmatched_costs(plain_costs, plain.relative_to)] == ["parameters", "FLOPs", "state"]
    assert "parameters" not in [words.split()[0] for words in unmatched_costs(costs, comparison.relative_to)]


def test_unmatched_costs_are_named_with_their_extremes() -> None:
    costs: dict[str, dict[str, float]] = {
        "a": {"parameter_bytes": 100, "flops": 100, "state_bytes": 100},
        "b": {"parameter_bytes": 150, "flops": 100.5, "state_bytes": 10},
        "c": {"parameter_bytes": 120, "flops": 99.5, "state_bytes": 400},
    }
    assert unmatched_costs(costs, "a") == ["parameters 1× to 1.5× (b)", "state 0.1× (b) to 4× (c)"]
    assert unmatched_costs({"a": costs["a"]}, "a") == []


def test_layer_parameters_are_counted_by_hand() -> None:
    comparison = read("attention=[standard]", *SMALL)
    attention, norms, feed_forward = 4 * 32 * 32, 2 * 2 * 32, 2 * 32 * 7 + 7 + 32
    assert count_layer_parameters(comparison.candidates[0], comparison.model, 7) == attention + norms + feed_forward


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["match=flops"], "match must be null or one of params, got 'flops'"),
        (
            ["match=params"],
            "match=params equalises parameters through ff_dim, which needs model.scope=layer or model, got",
        ),
        (["match=params", "model.scope=layer", "relative_to=nope"], "match=params needs the attention relative_to='nope' among"),
        (
            ["match=params", "model.scope=layer", "model.ff_dim=8"],
            r"cannot bring a layer of 'bsbr' within 1% of the 4,776 parameters of 'standard': closest is [\d,]+, at ff_dim=1; ",
        ),
        (["search=gold"], "search must be null or one of max_context, got 'gold'"),
        (["sweep=all"], "sweep=all is many sweeps, which python -m evals.run makes one after the other; name a single one here"),
        (["model.scope=block"], "model.scope must be one of attention, layer, model, got 'block'"),
        (["model.head_dim=32"], "hidden_dim must be num_heads times head_dim, got hidden_dim=32, num_heads=2, head_dim=32; one"),
        (
            ["model.head_dim=5", "model.num_heads=null"],
            "got hidden_dim=32, num_heads=null, head_dim=5; one of the three",
        ),
        (
            ["model.head_dim=64", "model.num_heads=null"],
            "got hidden_dim=32, num_heads=null, head_dim=64; one of the three",
        ),
        (["model.hidden_dim=null"], "one may be null, got null for hidden_dim and head_dim"),
        (["model.head_dim=0", "model.hidden_dim=null"], "model.head_dim must be a positive integer, got 0"),
        (["~model.vocab_size"], "config key 'model.vocab_size' is missing"),
        (["model.ff_dim=null"], "model.ff_dim must be a positive integer, got None"),
        (
            [f"device.threads={core_count() + 1}"],
            f"device.threads must be at most {core_count()}, the cores that this process may use, got",
        ),
        (
            ["workload=attention", "model.scope=layer"],
            "workloads.attention is measured at model.scope=attention only, got layer",
        ),
        (
            ["workload=attention", "model.scope=model"],
            "workloads.attention is measured at model.scope=attention only, got model",
        ),
        (
            ["workload=train_step", "model.scope=model", "shape.seq_len=1"],
            "workload evals.benchmark.workloads.train_step of a model needs shape.seq_len of at least 2, got 1",
        ),
        (["+workload.foo=3"], "workload evals.benchmark.workloads.prefill cannot take these options: .*'foo'"),
        (
            ["~workload._target_"],
            r"workload must be a mapping with a _target_, such as evals.benchmark.workloads.prefill, got \{\}",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str) -> None:
    small = [word for word in SMALL if word.partition("=")[0] not in {one.partition("=")[0] for one in arguments}]
    with pytest.raises(UsageError) as refusal:
        read(*small, *arguments)
    assert re.search(sentence, str(refusal.value))
    assert "\n" not in str(refusal.value)


def test_threads_that_nobody_asked_for_fit_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: core_count() + 1)  # as OMP_NUM_THREADS may say
    assert read("device.threads=null").device.threads == core_count()


@pytest.mark.parametrize("group", ["shape", "model", "device", "sampling", "workload"])
def test_a_group_that_is_not_a_mapping_is_refused(group: str) -> None:
    cfg = compose("config", [])
    cfg[group] = 3
    with pytest.raises(UsageError, match=f"^{group} must be a mapping with .*, got 3$"):
        read_job(cfg)
