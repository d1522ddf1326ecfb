"""Builds the task of a comparison, and checks that the comparison can be trained on it."""

from dataclasses import replace

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from evals.config import Comparison
from evals.errors import UsageError, one_sentence
from evals.training.tasks.base import Task


def build_task(comparison: Comparison) -> Task:
    """Builds the task that a comparison's `task` describes, at the comparison's length.

    Raises:
        UsageError: if the mapping cannot be instantiated, or is not a `Task`.
    """
    node = comparison.task
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise UsageError(f"task must be null or a mapping with a _target_, such as evals.training.tasks.mqar.MQAR, got {node!r}")
    try:
        task = instantiate(node, seq_len=comparison.shape.seq_len)
    except InstantiationException as error:
        raise UsageError(f"task {node['_target_']} cannot be made: {one_sentence(error.__cause__ or error)}") from error
    if not isinstance(task, Task):
        raise UsageError(f"task {node['_target_']} is {type(task).__name__}, not a subclass of evals.training.tasks.base.Task")
    return task


def adapt_to_task(comparison: Comparison) -> Comparison:
    """Gives the model of a comparison the vocabulary of its task.

    Raises:
        UsageError: if the comparison's scope, dtype or batch size cannot be trained, or if it has a search too.
        ValueError: if the task is not possible at a length of the curriculum or of the evaluations.
    """
    model, device, training = comparison.model, comparison.device, comparison.training
    if comparison.search is not None:
        raise UsageError(f"a comparison has a task or a search, not both, got search={comparison.search}")
    if model.scope != "model":
        raise UsageError(f"a task is learned by a whole model: it needs model.scope=model, got {model.scope}")
    if device.dtype not in ("float32", "bfloat16" if device.kind == "cuda" else "float64"):
        raise UsageError(f"training takes device.dtype=float32, or bfloat16 on cuda or float64 on cpu, got {device.dtype}")
    if comparison.shape.batch_size < training.grad_accumulation_steps:
        raise UsageError(
            f"training.grad_accumulation_steps must be at most shape.batch_size = {comparison.shape.batch_size}, "
            f"got {training.grad_accumulation_steps}"
        )
    task = build_task(comparison)
    for multiple in training.eval_length_multiples:
        replace(task, seq_len=multiple * task.seq_len)
    for divisor in training.curriculum:
        task.shortened(divisor)
    return replace(comparison, model=replace(model, vocab_size=task.vocab_size))
