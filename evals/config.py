"""The door between Hydra and the harness: what comes in is checked here, once, and goes on as frozen dataclasses."""

import difflib
import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from bsbr.interface import Attention
from bsbr.model import TransformerLayer
from evals.tasks.task import Task

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Scope = Literal["attention", "layer", "model"]
Positions = Literal["sinusoidal", "rotary", "none"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
POSITIONS: tuple[Positions, ...] = get_args(Positions)
KEYS = (
    *("attention", "workload", "shape", "model", "device", "sampling"),
    *("task", "training", "relative_to", "match", "search", "swept", "sweep_name", "results_dir", "plots_dir", "tracker", "quiet"),
)
MATCHES = ("params",)
MATCHED_WITHIN = 0.01
SEARCHES = ("max_context",)
SWEEPS = Path(__file__).resolve().parents[1] / "conf" / "sweep"

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class UsageError(ValueError):
    """Something the user asked for cannot be: one sentence, said without a traceback, exit code 2."""


@dataclass(frozen=True)
class Shape:
    batch_size: int
    seq_len: int


@dataclass(frozen=True)
class Model:
    scope: Scope
    hidden_dim: int
    num_heads: int
    ff_dim: int
    num_layers: int
    vocab_size: int
    conv_size: int | None = None  # of a convolution in front of every attention of a layer or model
    positions: Positions = "sinusoidal"


@dataclass(frozen=True)
class Device:
    kind: Literal["cpu", "cuda"]
    dtype: str
    threads: int
    mode: Literal["eager", "graph"] = "eager"  # of launching on CUDA

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Sampling:
    budget_s: float
    target_rel_interval: float
    min_rounds: int
    max_rounds: int | None
    turns: int
    turn_s: float
    timeout_s: float
    memory_limit_gib: float | None
    seed: int


@dataclass(frozen=True)
class Training:
    """How every contestant learns: `warmup` is a part of the steps, `lengths` are multiples of seq_len at which it is asked.

    curriculum: what seq_len is divided by, in as many equal parts of the steps, one after the other; the last is 1.
    """

    steps: int
    learning_rates: tuple[float, ...]
    seeds: int
    warmup: float
    weight_decay: float
    clip: float
    accumulate: int
    examples: int
    curriculum: tuple[int, ...]
    lengths: tuple[int, ...]
    checkpoint_s: float

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What a trained model depends on, and is the same for all."""
        alike = {key: getattr(self, key) for key in ("steps", "warmup", "weight_decay", "clip", "accumulate", "examples")}
        return alike if self.curriculum == (1,) else {**alike, "curriculum": ",".join(map(str, self.curriculum))}

    def divisor(self, step: int) -> int:
        """What seq_len is divided by at a step of 0 … steps − 1."""
        return self.curriculum[step * len(self.curriculum) // self.steps]


@dataclass(frozen=True)
class Contestant:
    """One attention of a comparison: its name, and the node of `conf/attention/` that builds it."""

    name: str
    node: dict[str, Any]
    ff_dim: int | None = None  # of its feed-forward part; None is the model's

    def build(self, model: Model) -> Attention:
        """Raises UsageError if the node names nothing that can be built, or no `Attention`."""
        try:
            attention = instantiate(self.node, hidden_dim=model.hidden_dim, num_heads=model.num_heads)
        except InstantiationException as error:
            # Hydra's message wraps the one that says what is wrong.
            cause = error.__cause__ or error
            words = not_found(self.node["_target_"]) if "Error loading" in str(cause) else one_sentence(cause)
            if model.positions == "rotary" and "unexpected keyword argument 'rotary'" in words:
                words = (
                    "it has no option rotary, which model.positions=rotary sets for all; give it one, as bsbr.MultiHeadAttention "
                    "has, or take model.positions=sinusoidal or none"
                )
            raise UsageError(f"attention '{self.name}' cannot be built: {words}") from error
        if not isinstance(attention, Attention):
            raise UsageError(
                f"attention '{self.name}': _target_ {self.node['_target_']} is {type(attention).__name__}, "
                "not a subclass of bsbr.Attention"
            )
        return attention


@dataclass(frozen=True)
class Comparison:
    """Several attentions, one shape, one workload, one machine: the unit of work."""

    sweep: str
    swept: str | None  # the config key that the sweep varies
    option: dict[str, Any]  # its last part and value, so that an option of one attention can be swept like a setting
    contestants: tuple[Contestant, ...]
    relative_to: str
    match: str | None  # what is equalised between the contestants
    search: str | None  # what is looked for, instead of timing this one shape
    task: dict[str, Any] | None  # what is learned, instead of timing
    training: Training
    workload: dict[str, Any]
    shape: Shape
    model: Model
    device: Device
    sampling: Sampling

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What all its contestants are measured under, as the table of results names it."""
        model = asdict(self.model)
        if self.model.scope != "model":  # of the decoder no more is built
            layer = ("ff_dim", "conv_size") if self.model.scope == "layer" else ()
            model = {key: model[key] for key in ("scope", "hidden_dim", "num_heads", "positions", *layer)}
        if model.get("conv_size") is None:
            model.pop("conv_size", None)
        if model["positions"] == Model.positions:
            del model["positions"]
        match = {} if self.match is None else {"match": self.match}
        kind, node = ("workload", self.workload) if self.task is None else ("task", self.task)
        return {
            **self.option,
            kind: str(node["_target_"]).rpartition(".")[2],
            **{option: value for option, value in node.items() if option != "_target_"},
            **({} if self.task is None else self.training.settings),
            "device": self.device.kind,
            "dtype": self.device.dtype,
            "threads": self.device.threads,
            **({} if self.device.mode == "eager" else {"mode": self.device.mode}),
            **asdict(self.shape),
            **model,
            **match,
        }


def read_comparison(cfg: DictConfig, swept: str | None = None) -> Comparison:
    """The comparison that a composed config describes. Raises UsageError for what cannot be measured.

    swept: the key that the command varies, which counts where the config names none.
    """
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    if "sweeps" in values:
        raise UsageError("sweep=all is many sweeps, which python -m evals.run makes one after the other; name a single one here")
    attentions = values.get("attention")
    if not attentions:
        raise UsageError("no attention is selected; name at least one, such as 'attention=[bsbr,standard]'")
    if "block" in values:  # conf/attention/*.yaml have read it
        _integers("", {"block": values.pop("block")})
    _check_keys("", values, KEYS)
    if "_target_" in attentions:
        raise UsageError(
            "a file of attention/ holds one key, the attention's name, and _target_ and options under it; in one of those selected "
            f"_target_: {attentions['_target_']} stands at the top"
        )
    for name, node in attentions.items():
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise UsageError(
                f"attention '{name}' must be a mapping with a _target_, such as {{_target_: bsbr.BSBRAttention}}; got {node!r}"
            )
    if not isinstance(values["quiet"], bool):
        raise UsageError(f"quiet must be true or false, got {values['quiet']!r}")
    key = values["swept"] or swept
    place = None if key is None else OmegaConf.select(cfg, key)
    if values["swept"] and place is None:
        raise UsageError(f"swept must be a key of the config, such as shape.seq_len or attention.bsbr.chunk_size, got {key!r}")
    if not isinstance(place, int | float | str):  # lists of attentions are no x axis
        key = None
    model = _model(values["model"])
    rotary = {"rotary": True} if model.positions == "rotary" else {}
    comparison = Comparison(
        sweep=str(values["sweep_name"]),
        swept=key,
        option={} if key is None else {key.rpartition(".")[2]: place},
        contestants=tuple(Contestant(str(name), {**rotary, **node}) for name, node in attentions.items()),
        relative_to=str(values["relative_to"]),
        match=_choice("match", values["match"], MATCHES),
        search=_choice("search", values["search"], SEARCHES),
        task=values["task"],
        training=_training(values["training"]),
        workload=_workload(values["workload"]),
        shape=_shape(values["shape"]),
        model=model,
        device=_device(values["device"]),
        sampling=_sampling(values["sampling"]),
    )
    if comparison.task is None:
        _check_workload(comparison)
    else:
        comparison = _for_task(comparison)
    with torch.device("meta"):  # nothing is allocated, whatever the size
        for contestant in comparison.contestants:
            contestant.build(comparison.model)
    return comparison if comparison.match is None else matched(comparison)


def every_sweep(arguments: Sequence[str]) -> list[list[str]]:
    """The command's arguments, once for each sweep that they ask for: sweep=all is all those that conf/sweep/all.yaml lists."""
    if "sweep=all" not in arguments:
        return [list(arguments)]
    listed = yaml.safe_load((SWEEPS / "all.yaml").read_text())["sweeps"]
    return [[f"sweep={name}" if word == "sweep=all" else word for word in arguments] for name in listed]


# --- the same number of parameters --------------------------------------------------------------


def matched(comparison: Comparison) -> Comparison:
    """Every contestant with the ff_dim at which a layer of it has the parameters of the reference's, within 1 %.

    Raises UsageError where there is no feed-forward part, no reference, or no such ff_dim.
    """
    model = comparison.model
    if model.scope == "attention":
        raise UsageError("match=params equalises parameters through ff_dim, which needs model.scope=layer or model, got attention")
    reference = next((one for one in comparison.contestants if one.name == comparison.relative_to), None)
    if reference is None:
        raise UsageError(f"match=params needs the attention relative_to='{comparison.relative_to}' among those compared")
    target = layer_parameters(reference, model, model.ff_dim)
    contestants = []
    for one in comparison.contestants:
        least = layer_parameters(one, model, 1)
        step = layer_parameters(one, model, 2) - least
        ff_dim = model.ff_dim if one == reference else max(1, 1 + round((target - least) / step))
        closest = least + (ff_dim - 1) * step
        if abs(closest - target) > MATCHED_WITHIN * target:
            raise UsageError(
                f"match=params cannot bring a layer of '{one.name}' within {MATCHED_WITHIN:.0%} of the {target:,} parameters of "
                f"'{reference.name}': closest is {closest:,}, at ff_dim={ff_dim}; raise model.ff_dim, or leave '{one.name}' out"
            )
        contestants.append(replace(one, ff_dim=ff_dim))
    return replace(comparison, contestants=tuple(contestants))


def layer_parameters(contestant: Contestant, model: Model, ff_dim: int) -> int:
    with torch.device("meta"):
        layer = TransformerLayer(
            model.hidden_dim, model.num_heads, ff_dim, attention=lambda **_: contestant.build(model), conv_size=model.conv_size
        )
    return sum(parameter.numel() for parameter in layer.parameters())


# --- what a config must say ---------------------------------------------------------------------


def _choice(key: str, value: Any, known: Sequence[str]) -> str | None:
    if value is None or value in known:
        return None if value is None else str(value)
    raise UsageError(f"{key} must be null or one of {', '.join(known)}, got {value!r}")


def _workload(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict) or not isinstance(values.get("_target_"), str):
        raise UsageError(f"workload must be a mapping with a _target_, such as evals.workloads.prefill, got {values!r}")
    return values


def _check_workload(comparison: Comparison) -> None:
    """Raises UsageError unless the workload is a function that takes its options and can be measured at this scope."""
    options = {key: value for key, value in comparison.workload.items() if key != "_target_"}
    target, scope = comparison.workload["_target_"], comparison.model.scope
    try:
        function = get_method(target)
        inspect.signature(function).bind("module", "inputs", **options)
    except (ImportError, ValueError) as error:
        raise UsageError(f"workload._target_ must be a function such as evals.workloads.prefill: {one_sentence(error)}") from error
    except TypeError as error:
        raise UsageError(f"workload {target} cannot take these options: {one_sentence(error)}") from error
    scopes = getattr(function, "scopes", SCOPES)
    if scope not in scopes:
        raise UsageError(f"workload {target} is measured at model.scope={' or '.join(scopes)} only, got {scope}")
    shortest = vars(function).get("shortest", {}).get(scope, 1)
    if comparison.shape.seq_len < shortest:
        raise UsageError(
            f"workload {target} of a {scope} needs shape.seq_len of at least {shortest}, got {comparison.shape.seq_len}"
        )


def build_task(comparison: Comparison) -> Task:
    """What is learned, at the comparison's length. Raises UsageError if the node names nothing that can be built, or no `Task`."""
    node = comparison.task
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise UsageError(f"task must be null or a mapping with a _target_, such as evals.tasks.mqar.MQAR, got {node!r}")
    try:
        task = instantiate(node, seq_len=comparison.shape.seq_len)
    except InstantiationException as error:
        raise UsageError(f"task {node['_target_']} cannot be made: {one_sentence(error.__cause__ or error)}") from error
    if not isinstance(task, Task):
        raise UsageError(f"task {node['_target_']} is {type(task).__name__}, not a subclass of evals.tasks.task.Task")
    return task


def _for_task(comparison: Comparison) -> Comparison:
    """With the task's vocabulary. Raises UsageError for what cannot be trained."""
    model, device, training = comparison.model, comparison.device, comparison.training
    if comparison.search is not None:
        raise UsageError(f"a comparison has a task or a search, not both, got search={comparison.search}")
    if model.scope != "model":
        raise UsageError(f"a task is learned by a whole model: it needs model.scope=model, got {model.scope}")
    if device.dtype not in ("float32", "bfloat16" if device.kind == "cuda" else "float64"):
        raise UsageError(f"training takes device.dtype=float32, or bfloat16 on cuda or float64 on cpu, got {device.dtype}")
    if comparison.shape.batch_size < training.accumulate:
        raise UsageError(
            f"training.accumulate must be at most shape.batch_size = {comparison.shape.batch_size}, got {training.accumulate}"
        )
    task = build_task(comparison)
    for times in training.lengths:
        replace(task, seq_len=times * task.seq_len)
    for divisor in training.curriculum:
        task.part(divisor)
    return replace(comparison, model=replace(model, vocab_size=task.vocab_size))


def _training(values: dict[str, Any]) -> Training:
    _check_keys("training.", values, names(Training))
    _integers("training", {key: values[key] for key in ("steps", "seeds", "accumulate", "examples")})
    for key in ("learning_rates", "lengths", "curriculum"):
        given = values[key] = tuple(values[key]) if isinstance(values[key], list) else (values[key],)
        kinds, what = (int | float, "numbers") if key == "learning_rates" else (int, "whole numbers")
        if not given or not all(isinstance(one, kinds) and not isinstance(one, bool) and one > 0 for one in given):
            raise UsageError(f"training.{key} must be a list of {what} above 0, got {list(given)!r}")
    if values["curriculum"][-1] != 1:
        raise UsageError(f"training.curriculum must end with 1, the whole shape.seq_len, got {list(values['curriculum'])!r}")
    for key, least in (("warmup", 0), ("weight_decay", 0), ("clip", 1e-9), ("checkpoint_s", 0)):
        if isinstance(values[key], bool) or not isinstance(values[key], int | float) or values[key] < least:
            raise UsageError(f"training.{key} must be a number of at least {least:g}, got {values[key]!r}")
    if values["warmup"] > 1:
        raise UsageError(f"training.warmup must be a part of the steps, from 0 to 1, got {values['warmup']!r}")
    return Training(**values)


def _shape(values: dict[str, Any]) -> Shape:
    _check_keys("shape.", values, names(Shape))
    return Shape(**_integers("shape", values))


def _model(values: dict[str, Any]) -> Model:
    _check_keys("model.", values, [*names(Model), "head_dim"])
    if values["scope"] not in SCOPES:
        raise UsageError(f"model.scope must be one of {', '.join(SCOPES)}, got {values['scope']!r}")
    if values["positions"] not in POSITIONS:
        raise UsageError(f"model.positions must be one of {', '.join(POSITIONS)}, got {values['positions']!r}")
    open_ = [key for key in ("hidden_dim", "num_heads", "head_dim") if values[key] is None]
    absent = ["scope", "positions", *open_, *(["conv_size"] if values["conv_size"] is None else [])]
    sizes = _integers("model", {key: value for key, value in values.items() if key not in absent})
    head_dim = sizes.pop("head_dim", None)
    if len(open_) > 1:
        raise UsageError(f"of model.hidden_dim, num_heads and head_dim one may be null, got null for {' and '.join(open_)}")
    if head_dim is not None:
        if "hidden_dim" in open_:
            sizes["hidden_dim"] = sizes["num_heads"] * head_dim
        elif "num_heads" in open_:
            sizes["num_heads"] = sizes["hidden_dim"] // head_dim or 1
        if sizes["hidden_dim"] != sizes["num_heads"] * head_dim:
            raise UsageError(
                f"model.hidden_dim must be num_heads times head_dim, got hidden_dim={sizes['hidden_dim']}, "
                f"num_heads={values['num_heads'] or 'null'}, head_dim={head_dim}; one of the three may be null"
            )
    return Model(scope=values["scope"], positions=values["positions"], **sizes)


def _device(values: dict[str, Any]) -> Device:
    _check_keys("device.", values, names(Device))
    kind, dtype = values["kind"], values["dtype"]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device.kind must be cpu or cuda, got {kind!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda was asked for, but torch sees no CUDA device here; use device=cpu, or a CUDA build of torch")
    if dtype not in DTYPES:
        raise UsageError(f"device.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    threads = torch.get_num_threads() if values["threads"] is None else values["threads"]
    if _integers("device", {"threads": threads})["threads"] > cores():
        raise UsageError(f"device.threads must be at most {cores()}, the cores that this process may use, got {threads}")
    if values["mode"] not in ("eager", "graph") or (kind == "cpu" and values["mode"] != "eager"):
        raise UsageError(f"device.mode must be eager, or with device=cuda graph, got {values['mode']!r}")
    return Device(kind=kind, dtype=dtype, threads=threads, mode=values["mode"])


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numbers_of_threads() -> str:
    """1,2,4,… up to all cores, as a sweep over this machine's threads writes it."""
    return ",".join(map(str, sorted({2**power for power in range(cores().bit_length())} | {cores()})))


OmegaConf.register_new_resolver("numbers_of_threads", _numbers_of_threads, replace=True)


def _sampling(values: dict[str, Any]) -> Sampling:
    _check_keys("sampling.", values, names(Sampling))
    optional = ("max_rounds", "memory_limit_gib")
    given = {key: value for key, value in values.items() if value is not None or key not in optional}
    _integers("sampling", {key: given[key] for key in ("min_rounds", "max_rounds", "turns") if key in given})
    for key in ("budget_s", "target_rel_interval", "turn_s", "timeout_s", "memory_limit_gib"):
        if key in given and not (isinstance(given[key], int | float) and given[key] > 0):
            raise UsageError(f"sampling.{key} must be a number above 0, got {given[key]!r}")
    if not isinstance(values["seed"], int):
        raise UsageError(f"sampling.seed must be an integer, got {values['seed']!r}")
    return Sampling(**values)


def _check_keys(group: str, values: Any, expected: Sequence[str]) -> None:
    """Raises UsageError unless `values` has the expected keys and no others."""
    known = ", ".join(group + key for key in expected)
    if not isinstance(values, dict):
        raise UsageError(f"{group.rstrip('.')} must be a mapping with the keys {known}, got {values!r}")
    for key in values:
        if key not in expected:
            raise UsageError(f"unknown config key '{group}{key}'; known are {known}")
    for key in expected:
        if key not in values:
            raise UsageError(f"config key '{group}{key}' is missing; there must be {known}")


def _integers(group: str, values: dict[str, Any]) -> dict[str, int]:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{group}{'.' if group else ''}{key} must be a positive integer, got {value!r}")
    return values


def names(cls: "type[DataclassInstance]") -> list[str]:
    return [field.name for field in fields(cls)]


def digest(value: Any) -> str:
    """16 hexadecimal digits that change when `value` (of JSON's types) does."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def not_found(target: str) -> str:
    """Why there is no such class, in words."""
    module, _, name = target.rpartition(".")
    try:
        there = vars(importlib.import_module(module))
    except Exception as error:  # noqa: BLE001  importing runs anybody's code
        return (
            f"module {module} cannot be imported: {type(error).__name__}: {one_sentence(error)}; "
            "a module of your own lies in the folder of --config-dir, or beside it"
        )
    return f"module {module} has no {name}{did_you_mean(name, there)}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """What to put behind `given`, which is unknown; empty where nothing is like it."""
    like = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f" (did you mean {like[0]}?)" if like else ""


def one_sentence(error: BaseException) -> str:
    """An error's message on one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
