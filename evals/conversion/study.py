"""TODO: what lives here."""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bsbr.convert import convert_to_bsbr
from evals.conversion.distill import converted_attention_names, count_trained_parameters, distill
from evals.conversion.teachers import Teacher, nats, pretrained, train, windows
from evals.plots.conversion import STAGES
from evals.results.ledger import Record
from evals.results.schema import columns
from evals.stats.intervals import mean_interval
from evals.training.optimizer import OptimizerSettings
from evals.training.tasks.base import Split

AGREEMENTS = (1, 5, 10)
FOLDERS: dict[Split, str] = {"test": "distillation", "validation": "distillation_validation"}
"""Of the results, by the split whose windows all are asked."""

SETTINGS = (
    *("chunk_size", "chunk_overlap", "chunks", "batch", "align_steps", "distil_steps", "learning_rate", "rank", "retrieval"),
    *("split", "num_eval_examples"),
)


@dataclass(frozen=True)
class DistillationPlan:
    """What a run depends on, apart from the code.

    chunks: the context, in chunks of `chunk_size` tokens. retrieval: whether what it learns moves, or low-rank additions alone.
    split: which windows all are asked.
    """

    original: Teacher
    chunk_size: int
    chunk_overlap: int
    chunks: int
    batch: int
    align_steps: int
    distil_steps: int
    learning_rate: float
    rank: int
    retrieval: bool
    split: Split
    num_eval_examples: int


def run(plan: DistillationPlan, originals: Path, folder: Path, watch: tqdm) -> Record:  # type: ignore[type-arg]
    """What the three models come to. originals: where those that were trained are kept; folder: of the checkpoints of healing."""
    one, texts = plan.original, plan.original.texts()
    name = f"{one.model}, seed {one.seed}"
    if one.pretrained:
        original = pretrained(one.model)
    else:
        original = one.untrained()
        for step, loss in train(original, one, texts, originals / one.file):
            watch.set_description_str(f"{name}: train {step}, loss {loss:.4f}")
    original.eval()
    torch.manual_seed(one.seed)
    converted = convert_to_bsbr(original, plan.chunk_size, chunk_overlap=plan.chunk_overlap)
    models = {"original": original, "converted": deepcopy(converted), "distilled": converted}
    moved = 0
    stages = distill(
        original,
        converted,
        lambda step: windows(texts, "train", plan.batch, one.context, "heal", one.seed, step),
        align=OptimizerSettings(plan.align_steps, plan.learning_rate),
        distil=OptimizerSettings(plan.distil_steps, plan.learning_rate),
        rank=plan.rank,
        retrieval=plan.retrieval,
        saved=folder,
    )
    for stage, step, loss in stages:
        moved = moved or count_trained_parameters(converted)
        watch.set_description_str(f"{name}: {stage} {step}, loss {loss:.4f}")
    # The same for every seed; of another name than what healing is given.
    asked = [
        windows(texts, plan.split, plan.batch, one.context, "asked", plan.split, i)
        for i in range(0, plan.num_eval_examples, plan.batch)
    ]
    found = compared(original, models, asked, plan)
    gates = [
        float(converted.get_submodule(name).retrieval.gate.detach().abs().mean()) for name in converted_attention_names(converted)
    ]
    parameters = sum(parameter.numel() for parameter in original.parameters())
    return {"models": found, "parameters": parameters, "trained_parameters": moved, "mean_gate": gates}


@torch.no_grad()
def compared(
    original: PreTrainedModel, models: Mapping[str, PreTrainedModel], asked: Sequence[Tensor], plan: DistillationPlan
) -> Record:
    """How each of the models does, and how near it is to the original.

    perplexity; `chunk_nats`: the mean loss in each chunk of the context. Of the last hidden states, cosine and mse, the latter
    over the original's mean square; kl, of its next-token distributions from the original's, in nats; `top_k`: how often
    the original's likeliest token is among the model's k likeliest.
    """
    parts: dict[str, dict[str, list[Tensor]]] = {name: {} for name in models}
    for ids in asked:
        wanted = _outputs(original, ids)
        for name, model in models.items():
            for measure, values in _beside(wanted, wanted if model is original else _outputs(model, ids), ids).items():
                parts[name].setdefault(measure, []).append(values)
    found = {}
    for name, measured in parts.items():
        tokens = {measure: torch.cat(part) for measure, part in measured.items()}
        means = {measure: float(value.mean()) for measure, value in tokens.items()}
        by_chunk = tokens["nats"].mean(dim=0).split([plan.chunk_size - 1, *[plan.chunk_size] * (plan.chunks - 1)])
        found[name] = {**means, "perplexity": math.exp(means["nats"]), "chunk_nats": [float(part.mean()) for part in by_chunk]}
    return found


def _beside(wanted: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """What is measured of every token [batch, time], the last hidden states' cosine and error of one more."""
    (logits_wanted, hidden_wanted), (logits, hidden) = wanted, got
    p, q = logits_wanted.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    first = logits_wanted.argmax(dim=-1, keepdim=True)
    return {
        "nats": nats(logits, ids),
        "cosine": F.cosine_similarity(hidden, hidden_wanted, dim=-1),
        "mse": (hidden - hidden_wanted).square().mean(dim=-1) / hidden_wanted.square().mean(),
        "kl": (p.exp() * (p - q)).sum(dim=-1),
        **{f"top_{k}": (logits.topk(k, dim=-1).indices == first).any(dim=-1).float() for k in AGREEMENTS},
    }


def _outputs(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits for every token but the first, and the last hidden states of all."""
    output = model(ids, use_cache=False, output_hidden_states=True)
    return output.logits[:, :-1], output.hidden_states[-1]


# --- tables -------------------------------------------------------------------------------------


def tables(records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """`converted`: a row a run and model. `positions`: the perplexity in each chunk of the context.

    gap_closed: of the nats a token that converting cost, the part that is back; gap_closed_beyond: the same of the
    tokens behind the first chunk, in which a conversion is its original, so that healing can only change it.
    """
    rows, positions = [], []
    for record in records:
        plan, models = record["plan"], record["models"]
        original = plan["original"]
        for stage, found in models.items():
            key = {"model": original["model"], "seed": original["seed"], "chunk_size": plan["chunk_size"]}
            key |= {"chunk_overlap": plan["chunk_overlap"], "stage": stage}
            values = {name: value for name, value in found.items() if name != "chunk_nats"}
            closed = {"gap_closed": _closed(models, stage, lambda one: one["nats"])}
            closed["gap_closed_beyond"] = _closed(models, stage, lambda one: sum(one["chunk_nats"][1:]))
            sizes = {"parameters": record["parameters"], "trained_parameters": record["trained_parameters"]}
            settings = {name: plan[name] for name in SETTINGS if name not in key}
            rows.append({**key, "context": original["context"], **values, **closed, **sizes, **settings})
            for chunk, loss in enumerate(found["chunk_nats"]):
                positions.append({**key, "position": chunk * plan["chunk_size"], "perplexity": math.exp(loss)})
    return {
        name: pd.DataFrame(made, columns=list(columns(name))) for name, made in (("conversion", rows), ("positions", positions))
    }


def _closed(models: Record, stage: str, loss: Callable[[Record], float]) -> float:
    """NaN where every token still sees all that it saw: there is no gap."""
    given, lost, now_ = (loss(models[name]) for name in ("original", "converted", stage))
    return (lost - now_) / (lost - given) if lost != given else math.nan


def told(results: pd.DataFrame) -> list[list[str]]:
    """Means over seeds, with half of the 95 % interval of how much was closed: a head, and a row each model and setting."""
    varied = [name for name in SETTINGS if name in results and results[name].nunique() > 1]
    rows = [["model", *varied, "seeds", "original", "converted", "distilled", "closed", "closed beyond a chunk"]]
    for key, own in results.groupby(["model", *varied], sort=False):
        stages = own.groupby("stage")
        perplexities = [math.exp(stages.get_group(stage)["nats"].mean()) for stage in STAGES]
        distilled = stages.get_group("distilled")
        shares = [mean_interval(list(distilled[column])) for column in ("gap_closed", "gap_closed_beyond")]
        counted = [f"{one.value:.0%}" + ("" if math.isnan(one.low) else f" ± {(one.high - one.low) / 2:.0%}") for one in shares]
        rows.append([*map(str, key), str(len(distilled)), *(f"{value:.3f}" for value in perplexities), *counted])
    return rows


def plans(arguments: argparse.Namespace) -> Iterator[DistillationPlan]:
    given = vars(arguments)
    healing = {name: given[name] for name in DistillationPlan.__dataclass_fields__ if name in given}
    training = {name: given[name] for name in Teacher.__dataclass_fields__ if name in given and name != "model"}
    training |= {"pretrained": bool(arguments.pretrained), "context": arguments.chunks * arguments.chunk_size}
    for name in [arguments.pretrained] if arguments.pretrained else arguments.model:
        for seed in range(arguments.seeds):
            yield DistillationPlan(Teacher(**{**training, "model": name, "seed": seed}), **healing)
