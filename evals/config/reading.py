"""Reads a composed Hydra config into a `Comparison`; whatever is wrong with a setting is a UsageError that names it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from evals.config.settings import DTYPES, POSITIONS, SCOPES, Candidate, Comparison, Device, Model, Sampling, Shape, Training
from evals.errors import UsageError
from evals.isolation.affinity import core_count, thread_counts

OmegaConf.register_new_resolver("thread_counts", thread_counts, replace=True)


# --- the rules -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a setting must be: the words that complete "must be …", and the check."""

    expected: str
    holds: Callable[[Any], bool]

    def check(self, key: str, value: Any) -> None:
        """Raises UsageError if a value breaks the rule."""
        if not self.holds(value):
            raise UsageError(f"{key} must be {self.expected}, got {value!r}")


def is_number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def at_least(least: float) -> Rule:
    return Rule(f"a number of at least {least:g}", lambda value: is_number(value) and value >= least)


def one_of(known: Collection[str], expected: str = "one of {}") -> Rule:
    return Rule(expected.format(", ".join(known)), lambda value: isinstance(value, str) and value in known)


def optional(rule: Rule) -> Rule:
    return Rule(rule.expected, lambda value: value is None or rule.holds(value))


def list_of(kind: Any, expected: str) -> Rule:
    return Rule(
        f"a list of {expected} above 0",
        lambda values: bool(values) and all(is_number(value, kind) and value > 0 for value in values),
    )


def mapping_with_target(example: str) -> Rule:
    return Rule(
        f"a mapping with a _target_, such as {example}",
        lambda value: isinstance(value, dict) and isinstance(value.get("_target_"), str),
    )


SIZE = Rule("a positive integer", lambda value: is_number(value, int) and value >= 1)
POSITIVE = Rule("a number above 0", lambda value: is_number(value) and value > 0)

RULES: dict[str, dict[str, Rule]] = {
    "shape": {"batch_size": SIZE, "seq_len": SIZE},
    "model": {
        "scope": one_of(SCOPES),
        "positions": one_of(POSITIONS),
        **dict.fromkeys(("hidden_dim", "num_heads", "head_dim", "conv_size"), optional(SIZE)),
        **dict.fromkeys(("ff_dim", "num_layers", "vocab_size"), SIZE),
    },
    "device": {
        "kind": Rule("cpu or cuda", lambda value: value in ("cpu", "cuda")),
        "dtype": one_of(DTYPES),
        "threads": optional(SIZE),
        "mode": Rule("eager, or with device=cuda graph", lambda value: value in ("eager", "graph")),
    },
    "sampling": {
        **dict.fromkeys(("budget_s", "target_rel_interval", "time_slice_s", "timeout_s"), POSITIVE),
        **dict.fromkeys(("min_rounds", "time_slices"), SIZE),
        "max_rounds": optional(SIZE),
        "memory_limit_gib": optional(POSITIVE),
        "seed": Rule("an integer", lambda value: is_number(value, int)),
    },
    "training": {
        **dict.fromkeys(("steps", "seeds", "grad_accumulation_steps", "num_eval_examples"), SIZE),
        "learning_rates": list_of((int, float), "numbers"),
        "curriculum": list_of(int, "whole numbers"),
        "eval_length_multiples": list_of(int, "whole numbers"),
        "warmup_fraction": Rule("a part of the steps, from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1),
        "weight_decay": at_least(0),
        "grad_clip_norm": at_least(1e-9),
        "checkpoint_s": at_least(0),
    },
}
"""The keys of each group of settings, and the rule of each."""

LISTS = ("learning_rates", "curriculum", "eval_length_multiples")
"""The settings of `training` that are lists."""

TOP: dict[str, Rule | None] = {
    **dict.fromkeys(("attention", *RULES, "task", "relative_to", "swept", "sweep_name", "results_dir", "plots_dir", "tracker")),
    "workload": mapping_with_target("evals.benchmark.workloads.prefill"),
    "match": optional(one_of(("params",), "null or one of {}")),
    "search": optional(one_of(("max_context",), "null or one of {}")),
    "quiet": Rule("true or false", lambda value: isinstance(value, bool)),
}
"""The keys of a config, and the rules of those that are no group."""


# --- reading -------------------------------------------------------------------------------------


def read_comparison(cfg: DictConfig, swept: str | None = None) -> Comparison:
    """Reads and checks a composed config.

    Args:
        cfg: a job's composed config.
        swept: the setting that the command varies, which counts if the config names none.

    Returns:
        The comparison that the config describes.

    Raises:
        UsageError: for an unknown or missing key, a value that breaks its rule, or an attention that cannot be built.
    """
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    if "sweeps" in values:
        raise UsageError("sweep=all is many sweeps, which python -m evals.run makes one after the other; name a single one here")
    nodes = values.get("attention")
    if not nodes:
        raise UsageError("no attention is selected; name at least one, such as 'attention=[bsbr,standard]'")
    if "block" in values:  # conf/attention/*.yaml have read it
        SIZE.check("block", values.pop("block"))
    check_keys("", values, TOP)
    for key, rule in TOP.items():
        if rule is not None:
            rule.check(key, values[key])
    option = read_swept(cfg, values["swept"] or swept, required=values["swept"] is not None)
    model = read_model(values["model"])
    comparison = Comparison(
        sweep=str(values["sweep_name"]),
        swept=(values["swept"] or swept) if option else None,
        option=option,
        candidates=read_candidates(nodes, rotary=model.positions == "rotary"),
        relative_to=str(values["relative_to"]),
        match=values["match"],
        search=values["search"],
        task=values["task"],
        training=read_training(values["training"]),
        workload=values["workload"],
        shape=Shape(**checked("shape", values["shape"])),
        model=model,
        device=read_device(values["device"]),
        sampling=Sampling(**checked("sampling", values["sampling"])),
    )
    with torch.device("meta"):  # allocates nothing, whatever the size
        for candidate in comparison.candidates:
            candidate.build(model)
    return comparison


def read_swept(cfg: DictConfig, key: str | None, *, required: bool) -> dict[str, Any]:
    """Reads the swept setting, as the last part of its name with its value; empty if it cannot be an x axis."""
    value = None if key is None else OmegaConf.select(cfg, key)
    if required and value is None:
        raise UsageError(f"swept must be a key of the config, such as shape.seq_len or attention.bsbr.chunk_size, got {key!r}")
    # A list of attentions cannot be an x axis.
    return {key.rpartition(".")[2]: value} if key is not None and isinstance(value, int | float | str) else {}


def read_candidates(nodes: Mapping[str, Any], *, rotary: bool) -> tuple[Candidate, ...]:
    if "_target_" in nodes:
        raise UsageError(
            "a file of attention/ holds one key, the attention's name, and _target_ and options under it; in one of those selected "
            f"_target_: {nodes['_target_']} stands at the top"
        )
    for name, node in nodes.items():
        mapping_with_target("{_target_: bsbr.BSBRAttention}").check(f"attention '{name}'", node)
    shared = {"rotary": True} if rotary else {}
    return tuple(Candidate(str(name), {**shared, **node}) for name, node in nodes.items())


def read_model(values: Any) -> Model:
    """Reads the model's sizes; one of hidden_dim, num_heads and head_dim may be null, and follows from the other two."""
    sizes = checked("model", values)
    head_dim = sizes.pop("head_dim")
    missing = [key for key in ("hidden_dim", "num_heads", "head_dim") if values[key] is None]
    if len(missing) > 1:
        raise UsageError(f"of model.hidden_dim, num_heads and head_dim one may be null, got null for {' and '.join(missing)}")
    if missing == ["hidden_dim"]:
        sizes["hidden_dim"] = sizes["num_heads"] * head_dim
    elif missing == ["num_heads"]:
        sizes["num_heads"] = sizes["hidden_dim"] // head_dim or 1
    if head_dim is not None and sizes["hidden_dim"] != sizes["num_heads"] * head_dim:
        raise UsageError(
            f"model.hidden_dim must be num_heads times head_dim, got hidden_dim={sizes['hidden_dim']}, "
            f"num_heads={values['num_heads'] or 'null'}, head_dim={head_dim}; one of the three may be null"
        )
    return Model(**sizes)


def read_device(values: Any) -> Device:
    device = checked("device", values)
    if device["kind"] == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda was asked for, but torch sees no CUDA device here; use device=cpu, or a CUDA build of torch")
    if device["threads"] is None:
        device["threads"] = torch.get_num_threads()
    if device["threads"] > core_count():
        raise UsageError(
            f"device.threads must be at most {core_count()}, the cores that this process may use, got {device['threads']}"
        )
    if device["kind"] == "cpu" and device["mode"] != "eager":
        raise UsageError(f"device.mode must be {RULES['device']['mode'].expected}, got {device['mode']!r}")
    return Device(**device)


def read_training(values: Any) -> Training:
    """Reads the training's settings; a single number may stand for a list of one."""
    if isinstance(values, dict):
        values |= {key: [values[key]] for key in LISTS if key in values and not isinstance(values[key], list)}
    training = checked("training", values)
    if training["curriculum"][-1] != 1:
        raise UsageError(f"training.curriculum must end with 1, the whole shape.seq_len, got {training['curriculum']!r}")
    training |= {key: tuple(training[key]) for key in LISTS}
    return Training(**training)


def checked(group: str, values: Any) -> dict[str, Any]:
    """A copy of a group's settings, if it has the right keys and every value obeys its rule."""
    check_keys(f"{group}.", values, RULES[group])
    for key, rule in RULES[group].items():
        rule.check(f"{group}.{key}", values[key])
    return dict(values)


def check_keys(prefix: str, values: Any, expected: Collection[str]) -> None:
    """Raises UsageError unless `values` is a mapping with the expected keys and no others."""
    known = ", ".join(prefix + key for key in expected)
    if not isinstance(values, dict):
        raise UsageError(f"{prefix.rstrip('.')} must be a mapping with the keys {known}, got {values!r}")
    for key in values:
        if key not in expected:
            raise UsageError(f"unknown config key '{prefix}{key}'; known are {known}")
    for key in expected:
        if key not in values:
            raise UsageError(f"config key '{prefix}{key}' is missing; there must be {known}")
