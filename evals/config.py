"""The door between Hydra and the harness: what comes in is checked here, once, and goes on as frozen dataclasses."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from bsbr.interface import Attention

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCOPES = ("attention", "layer", "model")
KEYS = (
    *("attention", "workload", "shape", "model", "device", "sampling"),
    *("relative_to", "swept", "sweep_name", "results_dir", "plots_dir"),
)

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
    scope: Literal["attention", "layer", "model"]
    hidden_dim: int
    num_heads: int
    ff_dim: int
    num_layers: int
    vocab_size: int


@dataclass(frozen=True)
class Device:
    kind: Literal["cpu", "cuda"]
    dtype: str
    threads: int

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
            raise UsageError(f"attention '{self.name}' cannot be built: {one_sentence(cause)}") from error
        if not isinstance(attention, Attention):
            raise UsageError(
                f"attention '{self.name}': _target_ {self.node['_target_']} is {type(attention).__name__}, "
                "not a subclass of bsbr.Attention"
            )
        return attention

    def code(self, attention: Attention) -> str:
        """A digest of the source that this attention runs: its own file and the core. Changed code makes new results."""
        own = {inspect.getsourcefile(cls) for cls in type(attention).__mro__ if issubclass(cls, Attention)}
        core = (inspect.getsourcefile(Attention) or "").rpartition("interface.py")[0]
        files = {Path(path) for path in own if path} | set(Path(core).glob("*.py"))
        return digest([path.read_text() for path in sorted(files)])


@dataclass(frozen=True)
class Comparison:
    """Several attentions, one shape, one workload, one machine: the unit of work."""

    sweep: str
    swept: str | None  # the config key that the sweep varies
    option: dict[str, Any]  # its last part and value, so that an option of one attention can be swept like a setting
    contestants: tuple[Contestant, ...]
    relative_to: str
    workload: dict[str, Any]
    shape: Shape
    model: Model
    device: Device
    sampling: Sampling

    @property
    def settings(self) -> dict[str, str | int]:
        """What all its contestants are measured under, as the table of results names it."""
        model = asdict(self.model)
        if self.model.scope == "attention":  # of the decoder nothing is built
            model = {key: model[key] for key in ("scope", "hidden_dim", "num_heads")}
        return {
            **self.option,
            "workload": str(self.workload["_target_"]).rpartition(".")[2],
            "device": self.device.kind,
            "dtype": self.device.dtype,
            "threads": self.device.threads,
            **asdict(self.shape),
            **model,
        }


def read_comparison(cfg: DictConfig, swept: str | None = None) -> Comparison:
    """The comparison that a composed config describes. Raises UsageError for what cannot be measured.

    swept: the key that the command varies, which counts where the config names none.
    """
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    attentions = values.get("attention")
    if not attentions:
        raise UsageError("no attention is selected; name at least one, such as 'attention=[bsbr,standard]'")
    _check_keys("", values, KEYS)
    for name, node in attentions.items():
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise UsageError(
                f"attention '{name}' must be a mapping with a _target_, such as {{_target_: bsbr.BSBRAttention}}; got {node!r}"
            )
    key = values["swept"] or swept
    place = None if key is None else OmegaConf.select(cfg, key)
    if values["swept"] and place is None:
        raise UsageError(f"swept must be a key of the config, such as shape.seq_len or attention.bsbr.chunk_size, got {key!r}")
    if not isinstance(place, int | float | str):  # lists of attentions are no x axis
        key = None
    comparison = Comparison(
        sweep=str(values["sweep_name"]),
        swept=key,
        option={} if key is None else {key.rpartition(".")[2]: place},
        contestants=tuple(Contestant(str(name), node) for name, node in attentions.items()),
        relative_to=str(values["relative_to"]),
        workload=values["workload"],
        shape=_shape(values["shape"]),
        model=_model(values["model"]),
        device=_device(values["device"]),
        sampling=_sampling(values["sampling"]),
    )
    try:
        get_method(comparison.workload["_target_"])
    except (ImportError, ValueError) as error:
        raise UsageError(f"workload._target_ must be a function such as evals.workloads.prefill: {one_sentence(error)}") from error
    with torch.device("meta"):  # nothing is allocated, whatever the size
        for contestant in comparison.contestants:
            contestant.build(comparison.model)
    return comparison


def _shape(values: dict[str, Any]) -> Shape:
    _check_keys("shape.", values, names(Shape))
    return Shape(**_integers("shape", values))


def _model(values: dict[str, Any]) -> Model:
    _check_keys("model.", values, names(Model))
    if values["scope"] not in SCOPES:
        raise UsageError(f"model.scope must be one of {', '.join(SCOPES)}, got {values['scope']!r}")
    sizes = _integers("model", {key: value for key, value in values.items() if key != "scope"})
    return Model(scope=values["scope"], **sizes)


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
    return Device(kind=kind, dtype=dtype, **_integers("device", {"threads": threads}))


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


def _check_keys(group: str, values: dict[str, Any], expected: Sequence[str]) -> None:
    """Raises UsageError unless `values` has the expected keys and no others."""
    known = ", ".join(group + key for key in expected)
    for key in values:
        if key not in expected:
            raise UsageError(f"unknown config key '{group}{key}'; known are {known}")
    for key in expected:
        if key not in values:
            raise UsageError(f"config key '{group}{key}' is missing; there must be {known}")


def _integers(group: str, values: dict[str, Any]) -> dict[str, int]:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{group}.{key} must be a positive integer, got {value!r}")
    return values


def names(cls: "type[DataclassInstance]") -> list[str]:
    return [field.name for field in fields(cls)]


def digest(value: Any) -> str:
    """16 hexadecimal digits that change when `value` (of JSON's types) does."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def one_sentence(error: BaseException) -> str:
    """An error's message on one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
