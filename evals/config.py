"""The door between Hydra and the harness: what comes in is checked here, once, and goes on as frozen dataclasses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bsbr.interface import Attention
from evals.errors import UsageError, not_found, one_sentence
from evals.isolation.affinity import core_count, thread_counts

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

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


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
    time_slices: int
    time_slice_s: float
    timeout_s: float
    memory_limit_gib: float | None
    seed: int


@dataclass(frozen=True)
class Training:
    """How every candidate learns: `warmup` is a part of the steps, `lengths` are multiples of seq_len at which it is asked.

    curriculum: what seq_len is divided by, in as many equal parts of the steps, one after the other; the last is 1.
    """

    steps: int
    learning_rates: tuple[float, ...]
    seeds: int
    warmup_fraction: float
    weight_decay: float
    grad_clip_norm: float
    grad_accumulation_steps: int
    num_eval_examples: int
    curriculum: tuple[int, ...]
    eval_length_multiples: tuple[int, ...]
    checkpoint_s: float

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What a trained model depends on, and is the same for all."""
        alike = {
            key: getattr(self, key)
            for key in (
                "steps",
                "warmup_fraction",
                "weight_decay",
                "grad_clip_norm",
                "grad_accumulation_steps",
                "num_eval_examples",
            )
        }
        return alike if self.curriculum == (1,) else {**alike, "curriculum": ",".join(map(str, self.curriculum))}

    def divisor(self, step: int) -> int:
        """What seq_len is divided by at a step of 0 … steps − 1."""
        return self.curriculum[step * len(self.curriculum) // self.steps]


@dataclass(frozen=True)
class Candidate:
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
    candidates: tuple[Candidate, ...]
    relative_to: str
    match: str | None  # what is equalised between the candidates
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
        """What all its candidates are measured under, as the table of results names it."""
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
        candidates=tuple(Candidate(str(name), {**rotary, **node}) for name, node in attentions.items()),
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
    with torch.device("meta"):  # nothing is allocated, whatever the size
        for candidate in comparison.candidates:
            candidate.build(comparison.model)
    return comparison


# --- what a config must say ---------------------------------------------------------------------


def _choice(key: str, value: Any, known: Sequence[str]) -> str | None:
    if value is None or value in known:
        return None if value is None else str(value)
    raise UsageError(f"{key} must be null or one of {', '.join(known)}, got {value!r}")


def _workload(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict) or not isinstance(values.get("_target_"), str):
        raise UsageError(f"workload must be a mapping with a _target_, such as evals.benchmark.workloads.prefill, got {values!r}")
    return values


def _training(values: dict[str, Any]) -> Training:
    _check_keys("training.", values, names(Training))
    _integers("training", {key: values[key] for key in ("steps", "seeds", "grad_accumulation_steps", "num_eval_examples")})
    for key in ("learning_rates", "eval_length_multiples", "curriculum"):
        given = values[key] = tuple(values[key]) if isinstance(values[key], list) else (values[key],)
        kinds, what = (int | float, "numbers") if key == "learning_rates" else (int, "whole numbers")
        if not given or not all(isinstance(one, kinds) and not isinstance(one, bool) and one > 0 for one in given):
            raise UsageError(f"training.{key} must be a list of {what} above 0, got {list(given)!r}")
    if values["curriculum"][-1] != 1:
        raise UsageError(f"training.curriculum must end with 1, the whole shape.seq_len, got {list(values['curriculum'])!r}")
    for key, least in (("warmup_fraction", 0), ("weight_decay", 0), ("grad_clip_norm", 1e-9), ("checkpoint_s", 0)):
        if isinstance(values[key], bool) or not isinstance(values[key], int | float) or values[key] < least:
            raise UsageError(f"training.{key} must be a number of at least {least:g}, got {values[key]!r}")
    if values["warmup_fraction"] > 1:
        raise UsageError(f"training.warmup_fraction must be a part of the steps, from 0 to 1, got {values['warmup_fraction']!r}")
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
    if _integers("device", {"threads": threads})["threads"] > core_count():
        raise UsageError(f"device.threads must be at most {core_count()}, the cores that this process may use, got {threads}")
    if values["mode"] not in ("eager", "graph") or (kind == "cpu" and values["mode"] != "eager"):
        raise UsageError(f"device.mode must be eager, or with device=cuda graph, got {values['mode']!r}")
    return Device(kind=kind, dtype=dtype, threads=threads, mode=values["mode"])


OmegaConf.register_new_resolver("numbers_of_threads", thread_counts, replace=True)


def _sampling(values: dict[str, Any]) -> Sampling:
    _check_keys("sampling.", values, names(Sampling))
    optional = ("max_rounds", "memory_limit_gib")
    given = {key: value for key, value in values.items() if value is not None or key not in optional}
    _integers("sampling", {key: given[key] for key in ("min_rounds", "max_rounds", "time_slices") if key in given})
    for key in ("budget_s", "target_rel_interval", "time_slice_s", "timeout_s", "memory_limit_gib"):
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
