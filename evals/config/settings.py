"""`Comparison`, the unit of work, and the settings it consists of."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_args

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from bsbr.interface import Attention
from evals.config.rules import Positive, Rule, Size, at_least, is_number, list_of, one_of
from evals.errors import UsageError, not_found, one_sentence
from evals.results.schema import columns

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Scope = Literal["attention", "layer", "model"]
Positions = Literal["sinusoidal", "rotary", "none"]
Kind = Literal["cpu", "cuda"]
Mode = Literal["eager", "graph"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

ADDED = ("set", "settings")
"""Columns that the report adds to tables."""

NEUTRAL = {"conv_size": None, "positions": "sinusoidal", "mode": "eager", "match": None, "curriculum": "1"}
"""Values at which a setting is left out of tables and keys: results from before there was such a setting stay comparable."""


@dataclass(frozen=True)
class Shape:
    """Size of the input, [batch_size, seq_len] tokens."""

    batch_size: Size
    seq_len: Size


@dataclass(frozen=True)
class Model:
    """Size of the attention, and the model around it; conf/model/base.yaml explains each setting."""

    scope: Annotated[Scope, one_of(SCOPES)]
    hidden_dim: Size
    num_heads: Size
    ff_dim: Size
    num_layers: Size
    vocab_size: Size
    conv_size: Size | None = None
    positions: Annotated[Positions, one_of(get_args(Positions))] = "sinusoidal"


@dataclass(frozen=True)
class Device:
    """Device, precision and threads of a comparison; conf/device/cuda.yaml explains each setting."""

    kind: Annotated[Kind, Rule("cpu or cuda", lambda value: value in ("cpu", "cuda"))]
    dtype: Annotated[str, one_of(DTYPES)]
    threads: Size
    mode: Annotated[Mode, Rule("eager, or with device=cuda graph", lambda value: value in ("eager", "graph"))] = "eager"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Sampling:
    """How long a comparison is timed, and the limits of its processes; conf/sampling/default.yaml explains each setting."""

    budget_s: Positive
    target_rel_interval: Positive
    min_rounds: Size
    max_rounds: Size | None
    time_slices: Size
    time_slice_s: Positive
    timeout_s: Positive
    memory_limit_gib: Positive | None
    seed: Annotated[int, Rule("an integer", lambda value: is_number(value, int))]


@dataclass(frozen=True)
class Training:
    """How every candidate is trained on a task; conf/training/default.yaml explains each setting."""

    steps: Size
    learning_rates: Annotated[tuple[float, ...], list_of((int, float), "numbers")]
    seeds: Size
    warmup_fraction: Annotated[float, Rule("a part of the steps, from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)]
    weight_decay: Annotated[float, at_least(0)]
    grad_clip_norm: Annotated[float, at_least(1e-9)]
    grad_accumulation_steps: Size
    num_eval_examples: Size
    curriculum: Annotated[tuple[int, ...], list_of(int, "whole numbers")]
    eval_length_multiples: Annotated[tuple[int, ...], list_of(int, "whole numbers")]
    checkpoint_s: Annotated[float, at_least(0)]

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What the trained model and its evaluation depend on, and all runs of a study share."""
        shared = ("steps", "warmup_fraction", "weight_decay", "grad_clip_norm", "grad_accumulation_steps", "num_eval_examples")
        return {**{key: getattr(self, key) for key in shared}, "curriculum": ",".join(map(str, self.curriculum))}

    def divisor(self, step: int) -> int:
        """The curriculum's divisor of seq_len at a step of 0 … steps − 1."""
        return self.curriculum[step * len(self.curriculum) // self.steps]


@dataclass(frozen=True)
class Candidate:
    """One attention of a comparison."""

    name: str
    node: dict[str, Any]  # _target_ and options
    ff_dim: int | None = None  # of its feed-forward part, if parameters are matched; None: the model's

    def build(self, model: Model) -> Attention:
        """Builds the attention, on torch's default device.

        Raises:
            UsageError: if the node cannot be instantiated, or is not an `Attention`.
        """
        try:
            attention = instantiate(self.node, hidden_dim=model.hidden_dim, num_heads=model.num_heads)
        except InstantiationException as error:
            cause = error.__cause__ or error  # Hydra wraps the exception with the useful message
            message = not_found(self.node["_target_"]) if "Error loading" in str(cause) else one_sentence(cause)
            if model.positions == "rotary" and "unexpected keyword argument 'rotary'" in message:
                message = (
                    "it has no option rotary, which model.positions=rotary sets for all; give it one, as bsbr.MultiHeadAttention "
                    "has, or take model.positions=sinusoidal or none"
                )
            raise UsageError(f"attention '{self.name}' cannot be built: {message}") from error
        if not isinstance(attention, Attention):
            raise UsageError(
                f"attention '{self.name}': _target_ {self.node['_target_']} is {type(attention).__name__}, "
                "not a subclass of bsbr.Attention"
            )
        return attention

    @property
    def certified(self) -> "Candidate":
        """The candidate whose certificate counts, in precisions and shapes that this one need not take.

        For a compiled attention it is the attention that is compiled: to compile it for every shape, dtype and mode of the
        certificate would take an hour. For a backend that does not take every dtype, it is `impl=auto`, which runs it where it can.
        """
        if self.node["_target_"] == COMPILED:
            return replace(self, node={key: value for key, value in self.node["attention"].items() if key != "_partial_"})
        if "impl" in self.node and self.node["impl"] in backends_of(self.node["_target_"]):
            return replace(self, node={**self.node, "impl": "auto"})
        return self


def backends_of(target: str) -> tuple[str, ...]:
    """The `backends` of the attention that a `_target_` names; none if it names no attention."""
    try:
        cls = get_object(target)
    except ImportError:  # what is wrong with it is said where the attention is built
        return ()
    return cls.backends if isinstance(cls, type) and issubclass(cls, Attention) else ()


COMPILE, COMPILED = "compile", "bsbr.compiled.CompiledAttention"
"""The option impl of an attention that torch.compile compiles, and the class that compiles it."""


def compiled(candidate: Candidate) -> Candidate:
    """The candidate with its attention on the torch backend, compiled."""
    attention = {**candidate.node, "impl": "torch", "_partial_": True}
    return replace(candidate, node={"_target_": COMPILED, "attention": attention})


@dataclass(frozen=True)
class Comparison:
    """Several attentions, one shape, one workload, one machine: the unit of work."""

    sweep: str  # also the name of its result folder
    varied: dict[str, Any]  # full names of the settings that the sweep varies, with their values here; the first is the x axis
    candidates: tuple[Candidate, ...]
    relative_to: str  # name of the candidate to which speed-ups are relative
    match: str | None  # params: equalises the candidates' parameters
    search: str | None  # max_context: searches the longest context instead of timing at this shape
    task: dict[str, Any] | None  # _target_ and options of the task to train on; None: time the workload
    training: Training
    workload: dict[str, Any]  # _target_ and options of what is timed
    shape: Shape
    model: Model
    device: Device
    sampling: Sampling

    @property
    def swept(self) -> str | None:
        """Full name of the setting on the x axis."""
        return next(iter(self.varied), None)

    @property
    def option(self) -> dict[str, Any]:
        """The columns of the varied settings, with their values here; null and lists as text.

        `evals.results.schema.column_of` finds the column of a key.
        """
        table = "accuracy" if self.task else "max_context" if self.search else "latency"
        shared, reserved = self._shared_settings, {*columns(table), *ADDED}
        option: dict[str, Any] = {}
        for key, value in self.varied.items():
            name = key.rpartition(".")[2]
            if name in shared and not key.startswith("attention."):
                column, value = name, shared[name]  # as it was resolved: threads=null is a number
            else:  # an option of an attention may have the name of another column, or of an option of another attention
                is_shared = any(other != key and other.rpartition(".")[2] == name for other in self.varied)
                column = key if name in shared or name in reserved or is_shared else name
            option[column] = value if isinstance(value, str | int | float) else json.dumps(value)
        return option

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Conditions that all candidates share, as columns of the table; settings without effect are left out unless varied."""
        shared = self._shared_settings.items()
        return {**self.option, **{key: value for key, value in shared if key not in NEUTRAL or value != NEUTRAL[key]}}

    @property
    def _shared_settings(self) -> dict[str, Any]:
        kind, node = ("workload", self.workload) if self.task is None else ("task", self.task)
        model = asdict(self.model)
        # A smaller scope builds less of the decoder.
        unused = {"attention": ("ff_dim", "conv_size", "num_layers", "vocab_size"), "layer": ("num_layers", "vocab_size")}
        for key in unused.get(self.model.scope, ()):
            del model[key]
        return {
            kind: str(node["_target_"]).rpartition(".")[2],
            **{option: value for option, value in node.items() if option != "_target_"},
            **({} if self.task is None else self.training.settings),
            "device": self.device.kind,
            **{key: value for key, value in asdict(self.device).items() if key != "kind"},
            **asdict(self.shape),
            **model,
            "match": self.match,
        }
