"""Checkpoints of a training run: one safetensors file with parameters, optimizer state, random state and progress."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer


def save(path: Path, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> None:
    """Writes parameters, buffers, optimizer state, the global random state, and `progress` as JSON.

    A process that is killed during the write does not change an earlier checkpoint.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in _named_tensors(model).items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, {"progress": json.dumps(progress)})
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
    """Restores model, optimizer and the global random state in place.

    Returns:
        The saved progress; None, with nothing changed, if the file does not exist.
    """
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
    with torch.no_grad():
        for name, tensor in _named_tensors(model).items():
            tensor.copy_(tensors[f"model.{name}"])
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # AdamW keeps its count of steps on the CPU, whatever the device.
        optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in state.items()}
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return progress


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each tensor once: a tied head is the embedding."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
