"""Reads a composed Hydra config into a `Comparison`; whatever is wrong with a setting is a UsageError that names it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evals.config.rules import FOLDER_NAME, NAME, SIZE, TEXT, Rule, check_fields, check_keys, mapping_with_target
from evals.config.settings import (
    COMPILE,
    COMPILED,
    Candidate,
    Comparison,
    Device,
    Model,
    Sampling,
    Shape,
    Training,
    backends_of,
    compiled,
)
from evals.errors import UsageError
from evals.isolation.affinity import core_count, thread_counts

OmegaConf.register_new_resolver("thread_counts", thread_counts, replace=True)

MISSING = object()
GROUPS = ("shape", "model", "device", "sampling", "training")
TOP_LEVEL: dict[str, Rule | None] = {
    **dict.fromkeys(("attention", *GROUPS, "task", "swept", "tracker")),
    "relative_to": TEXT,
    "sweep_name": FOLDER_NAME,
    "results_dir": TEXT,
    "plots_dir": TEXT,
    "workload": mapping_with_target("evals.benchmark.workloads.prefill"),
    "match": Rule("null or one of params", lambda value: value in (None, "params")),
    "search": Rule("null or one of max_context", lambda value: value in (None, "max_context")),
    "impls": Rule(
        "null or a list of backends, such as [torch,compile,cpp]",
        lambda value: value is None or (isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) for one in value)),
    ),
    "quiet": Rule("true or false", lambda value: isinstance(value, bool)),
    "figures": Rule("true or false", lambda value: isinstance(value, bool)),
}
"""The keys of a config, each with its rule; None for groups, which have rules of their own."""


def read_comparison(cfg: DictConfig, varied: Mapping[str, Any]) -> Comparison:
    """Reads and checks a job's composed config.

    Args:
        cfg: the config.
        varied: the keys that the command varies, with their values in this job. The first is on the x axis if the config names no
            `swept` key.

    Raises:
        UsageError: for an unknown or missing key, an interpolation without a value, a value that breaks its rule, or an attention
            that cannot be built.
    """
    try:
        values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # of an interpolation ${...}, which is resolved only here
        raise UsageError(f"config key '{error.full_key}' has no value: {str(error).splitlines()[0]}") from error
    if "sweeps" in values:
        raise UsageError("sweep=all is many sweeps, which python -m evals.run makes one after the other; name a single one here")
    nodes = values.get("attention")
    if not nodes:
        raise UsageError("no attention is selected; name at least one, such as 'attention=[bsbr,standard]'")
    if "block" in values:  # conf/attention/*.yaml interpolate it
        SIZE.check("block", values.pop("block"))
    check_keys("", values, TOP_LEVEL)
    for key, rule in TOP_LEVEL.items():
        if rule is not None:
            rule.check(key, values[key])
    check_fields(Shape, "shape", values["shape"])
    check_fields(Sampling, "sampling", values["sampling"])
    swept = values["swept"]
    if swept is not None and OmegaConf.select(cfg, str(swept), default=MISSING) is MISSING:
        raise UsageError(f"swept must be a key of the config, such as shape.seq_len or attention.bsbr.chunk_size, got {swept!r}")
    varied = ({} if swept is None else {swept: OmegaConf.select(cfg, swept)}) | dict(varied)
    model = read_model(values["model"])
    comparison = Comparison(
        sweep=values["sweep_name"],
        varied=varied,
        candidates=read_candidates(nodes, rotary=model.positions == "rotary", impls=values["impls"]),
        relative_to=values["relative_to"],
        match=values["match"],
        search=values["search"],
        task=values["task"],
        training=read_training(values["training"]),
        workload=values["workload"],
        shape=Shape(**values["shape"]),
        model=model,
        device=read_device(values["device"]),
        sampling=Sampling(**values["sampling"]),
    )
    compiles = any(one.node["_target_"] == COMPILED for one in comparison.candidates)
    if compiles and values["workload"]["_target_"].endswith(".decode"):
        raise UsageError("impl=compile compiles forward and attend, but workload=decode calls extend; leave one of them out")
    with torch.device("meta"):  # allocates nothing, whatever the size
        for candidate in comparison.candidates:
            candidate.build(model)
    return comparison


def read_candidates(nodes: Mapping[str, Any], *, rotary: bool, impls: Sequence[str] | None) -> tuple[Candidate, ...]:
    """Reads the attentions; with `impls`, each once for every backend among them that it has, as `<name>_<backend>`."""
    if "_target_" in nodes:
        raise UsageError(
            "a file of attention/ holds one key, the attention's name, and _target_ and options under it; in one of those selected "
            f"_target_: {nodes['_target_']} stands at the top"
        )
    for name, node in nodes.items():
        NAME.check("the name of an attention", name)
        mapping_with_target("{_target_: bsbr.BSBRAttention}").check(f"attention '{name}'", node)
    shared = {"rotary": True} if rotary else {}
    candidates = [Candidate(name, {**shared, **node}) for name, node in nodes.items()]
    if impls is not None:
        candidates = [
            Candidate(f"{one.name}_{impl}", {**one.node, "impl": impl})
            for one in candidates
            for impl in impls
            if impl in ("torch", COMPILE, *backends_of(one.node["_target_"]))
        ]
    return tuple(compiled(one) if one.node.get("impl") == COMPILE else one for one in candidates)


def read_model(values: Any) -> Model:
    """Reads the model's sizes; one of hidden_dim, num_heads and head_dim may be null, and follows from the other two."""
    check_keys("model.", values, dict.fromkeys([*(field.name for field in fields(Model)), "head_dim"]))
    sizes = {key: values[key] for key in ("hidden_dim", "num_heads", "head_dim")}
    missing = [key for key, size in sizes.items() if size is None]
    for key in sizes.keys() - missing:
        SIZE.check(f"model.{key}", sizes[key])
    if len(missing) > 1:
        raise UsageError(f"of model.hidden_dim, num_heads and head_dim one may be null, got null for {' and '.join(missing)}")
    head_dim = sizes.pop("head_dim")
    if missing == ["hidden_dim"]:
        sizes["hidden_dim"] = sizes["num_heads"] * head_dim
    elif missing == ["num_heads"]:
        sizes["num_heads"] = sizes["hidden_dim"] // head_dim or 1
    if head_dim is not None and sizes["hidden_dim"] != sizes["num_heads"] * head_dim:
        raise UsageError(
            f"model.hidden_dim must be num_heads times head_dim, got hidden_dim={sizes['hidden_dim']}, "
            f"num_heads={values['num_heads'] or 'null'}, head_dim={head_dim}; one of the three may be null"
        )
    model = {key: value for key, value in values.items() if key != "head_dim"} | sizes
    check_fields(Model, "model", model)
    return Model(**model)


def read_device(values: Any) -> Device:
    if isinstance(values, dict) and values.get("threads", 0) is None:
        values["threads"] = min(torch.get_num_threads(), core_count())  # which OMP_NUM_THREADS may exceed
    check_fields(Device, "device", values)
    device = Device(**values)
    if device.kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda was asked for, but torch sees no CUDA device here; use device=cpu, or a CUDA build of torch")
    if device.threads > core_count():
        raise UsageError(
            f"device.threads must be at most {core_count()}, the cores that this process may use, got {device.threads}"
        )
    if device.kind == "cpu" and device.mode != "eager":
        raise UsageError(f"device.mode must be eager, or with device=cuda graph, got {device.mode!r}")
    return device


def read_training(values: Any) -> Training:
    """Reads the training's settings; a single number may stand for a list of one."""
    lists = ("learning_rates", "curriculum", "eval_length_multiples")
    if isinstance(values, dict):
        values |= {key: [values[key]] for key in lists if key in values and not isinstance(values[key], list)}
    check_fields(Training, "training", values)
    if values["curriculum"][-1] != 1:
        raise UsageError(f"training.curriculum must end with 1, the whole shape.seq_len, got {values['curriculum']!r}")
    return Training(**{**values, **{key: tuple(values[key]) for key in lists}})
