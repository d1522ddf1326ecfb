"""`python -m evals.heal`: what converting costs, and how much of it healing gives back.

For each model and seed: trains a small one from its config, on the bytes of Python's standard library; converts it; heals
that. The three are asked the same held-out text. Every run is a line of results/conversion/samples.jsonl once it is done, and
checkpoints until then, from which the same command goes on; the tables beside it are made from all lines.
`--pretrained gpt2` takes a model of the hub, or a folder, in place of the small ones.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bsbr.convert import convert_to_bsbr
from evals import machine
from evals.cli import KEPT
from evals.config import digest, one_sentence
from evals.healing import Optimisation, attentions_of, heal, moving, optimise
from evals.ledger import Ledger, Record
from evals.measure import now
from evals.schema import columns
from evals.table import write
from evals.tasks.corpus import corpus
from evals.tasks.task import Split, generator
from evals.trials import source

MODELS = ("gpt2", "llama")
AGREEMENTS = (1, 5, 10)


@dataclass(frozen=True)
class Plan:
    """What a run depends on, apart from the code. `chunks`: the context, in chunks of `chunk_size` tokens."""

    model: str
    pretrained: bool
    seed: int
    hidden: int
    layers: int
    heads: int
    chunk_size: int
    chunk_overlap: int
    chunks: int
    batch: int
    train_steps: int
    align_steps: int
    distil_steps: int
    rank: int
    examples: int

    @property
    def context(self) -> int:
        return self.chunks * self.chunk_size


def run(plan: Plan, folder: Path, watch: tqdm) -> Record:  # type: ignore[type-arg]
    """What the three models come to on the test split. folder: of the checkpoints."""
    torch.manual_seed(plan.seed)
    if plan.pretrained:
        original = AutoModelForCausalLM.from_pretrained(plan.model, use_safetensors=True)
        texts = tokenised(plan.model)
    else:
        original, texts = AutoModelForCausalLM.from_config(small(plan)), dict(corpus().splits)
        train(original, plan, texts, folder / "train.safetensors", watch)
    original.eval()
    converted = convert_to_bsbr(original, plan.chunk_size, chunk_overlap=plan.chunk_overlap)
    test = [windows(texts["test"], plan, "test", start) for start in range(0, plan.examples, plan.batch)]
    found = {"original": compared(original, original, test, plan), "converted": compared(original, converted, test, plan)}
    moved = 0
    stages = heal(
        original,
        converted,
        lambda step: windows(texts["train"], plan, "heal", step),
        align=Optimisation(plan.align_steps, 1e-2),
        distil=Optimisation(plan.distil_steps, 1e-2),
        rank=plan.rank,
        saved=folder,
    )
    for stage, step, loss in stages:
        moved = moved or moving(converted)
        watch.set_description_str(f"{plan.model}, seed {plan.seed}: {stage} {step}, loss {loss:.4f}")
    found["healed"] = compared(original, converted, test, plan)
    gates = [float(converted.get_submodule(name).retrieval.gate.detach().abs().mean()) for name in attentions_of(converted)]
    parameters = sum(parameter.numel() for parameter in original.parameters())
    return {"models": found, "parameters": parameters, "moved": moved, "mean_gate": gates}


def small(plan: Plan) -> Any:
    """The config of a model of bytes."""
    gpt2 = {
        "n_embd": plan.hidden,
        "n_layer": plan.layers,
        "n_head": plan.heads,
        "n_positions": plan.context,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    llama = {
        "hidden_size": plan.hidden,
        "intermediate_size": 5 * plan.hidden // 2,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": plan.heads,
        "num_key_value_heads": plan.heads // 2,
        "max_position_embeddings": plan.context,
    }
    sizes: dict[str, Any] = gpt2 if plan.model == "gpt2" else llama
    return AutoConfig.for_model(plan.model, vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes)


def train(model: PreTrainedModel, plan: Plan, texts: dict[Split, NDArray[Any]], saved: Path, watch: tqdm) -> None:  # type: ignore[type-arg]
    def loss_of(step: int) -> Tensor:
        return losses(model, windows(texts["train"], plan, "train", step))[0].mean()

    for step, loss in optimise(model, loss_of, Optimisation(plan.train_steps, 3e-3), saved, weight_decay=0.1):
        watch.set_description_str(f"{plan.model}, seed {plan.seed}: train {step}, loss {loss:.4f}")


def tokenised(name: str) -> dict[Split, NDArray[Any]]:
    """The same text as a pretrained model reads it."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    return {
        split: np.array(tokenizer(text.tobytes().decode("utf-8", "replace"))["input_ids"])
        for split, text in corpus().splits.items()
    }


def windows(text: NDArray[Any], plan: Plan, split: str, step: int) -> Tensor:
    """Token ids [batch, context] from random places, which follow from the seed and the step."""
    seed = 0 if split == "test" else plan.seed
    starts = torch.randint(len(text) - plan.context, (plan.batch, 1), generator=generator("conversion", split, seed, step))
    return torch.from_numpy(text[(starts + torch.arange(plan.context)).numpy()]).long()


def losses(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nats of every token but the first [batch, context − 1]; the logits for them; the last hidden states."""
    output = model(ids, use_cache=False, output_hidden_states=True)
    logits = output.logits[:, :-1]
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return nats, logits, output.hidden_states[-1]


@torch.no_grad()
def compared(original: PreTrainedModel, model: PreTrainedModel, test: Sequence[Tensor], plan: Plan) -> Record:
    """How a model does, and how near it is to the original.

    perplexity; `chunk_nats`: the mean loss in each chunk of the context. Of the last hidden states, cosine and mse, the latter
    over the original's mean square; kl, of its next-token distributions from the original's, in nats; `top_k`: how often
    the original's likeliest token is among the model's k likeliest.
    """
    sums: dict[str, list[Tensor]] = {}
    for ids in test:
        _, wanted, hidden_wanted = losses(original, ids)
        nats, logits, hidden = losses(model, ids)
        p, q = wanted.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        first = wanted.argmax(dim=-1, keepdim=True)
        found = {
            "nats": nats,
            "cosine": F.cosine_similarity(hidden, hidden_wanted, dim=-1),
            "mse": (hidden - hidden_wanted).square().mean(dim=-1) / hidden_wanted.square().mean(),
            "kl": (p.exp() * (p - q)).sum(dim=-1),
            **{f"top_{k}": (logits.topk(k, dim=-1).indices == first).any(dim=-1).float() for k in AGREEMENTS},
        }
        for name, values in found.items():
            sums.setdefault(name, []).append(values)
    means = {name: float(torch.cat(parts).mean()) for name, parts in sums.items()}
    by_chunk = torch.cat(sums["nats"]).mean(dim=0).split([plan.chunk_size - 1, *[plan.chunk_size] * (plan.chunks - 1)])
    return {**means, "perplexity": math.exp(means["nats"]), "chunk_nats": [float(part.mean()) for part in by_chunk]}


# --- tables -------------------------------------------------------------------------------------


def tables(records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """`converted`: a row a run and model. `positions`: the perplexity in each chunk of the context."""
    rows, positions = [], []
    for record in records:
        plan, models = record["plan"], record["models"]
        given, lost = (models[name]["perplexity"] for name in ("original", "converted"))
        for name, found in models.items():
            key = {one: plan[one] for one in ("model", "seed", "chunk_size", "chunk_overlap")} | {"stage": name}
            values = {one: value for one, value in found.items() if one != "chunk_nats"}
            # Where every token still sees all that it saw, there is no gap.
            closed = {"gap_closed": (lost - found["perplexity"]) / (lost - given) if lost != given else math.nan}
            sizes = {"parameters": record["parameters"], "moved": record["moved"]}
            rows.append({**key, "context": plan["chunks"] * plan["chunk_size"], **values, **closed, **sizes})
            for chunk, nats in enumerate(found["chunk_nats"]):
                positions.append({**key, "position": chunk * plan["chunk_size"], "perplexity": math.exp(nats)})
    return {name: pd.DataFrame(made, columns=list(columns(name))) for name, made in (("converted", rows), ("positions", positions))}


def main(words: Sequence[str] | None = None) -> int:
    arguments = parsed(words)
    torch.set_num_threads(arguments.threads)
    folder = arguments.results_dir / "conversion"
    ledger, code = Ledger(folder / "samples.jsonl"), source("heal.py", "healing.py")
    watch = tqdm(disable=None, leave=False, bar_format="{desc}")
    try:
        for plan in plans(arguments):
            key = digest([vars(plan), corpus().sha256, code, torch.__version__])
            if any(record["run"] == key for record in ledger.read()[0]):
                continue
            checkpoints = folder / "checkpoints" / key
            came_to = run(plan, checkpoints, watch)
            ledger.append(
                {"kind": "conversion", "run": key, "plan": vars(plan), **came_to, "provenance": machine.provenance(), "time": now()}
            )
            for path in checkpoints.glob("*.safetensors"):
                path.unlink()
    except KeyboardInterrupt:
        print(KEPT, file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return 2
    finally:
        watch.close()
    made = tables(ledger.read()[0])
    for name, table in made.items():
        write(table, folder, name)
    shown = made["converted"][["model", "seed", "stage", "perplexity", "gap_closed", "kl", "cosine", "top_1", "top_5", "top_10"]]
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"\n{folder / 'results.csv'}: {len(shown)} rows")
    return 0


def plans(arguments: argparse.Namespace) -> Iterator[Plan]:
    fields = {name: getattr(arguments, name) for name in Plan.__dataclass_fields__ if hasattr(arguments, name)}
    names = [arguments.pretrained] if arguments.pretrained else arguments.model
    for name in names:
        for seed in range(arguments.seeds):
            yield Plan(**{**fields, "model": name, "pretrained": bool(arguments.pretrained), "seed": seed})


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals.heal", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="which small models")
    parser.add_argument("--pretrained", help="the name or folder of a pretrained model, instead")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), dest="results_dir")
    numbers = {
        "seeds": (2, "of each model"),
        "hidden": (64, "width of the small models"),
        "layers": (2, "of the small models"),
        "heads": (4, "of the small models"),
        "chunk-size": (16, "of the conversion, in tokens"),
        "chunk-overlap": (8, "tokens before its chunk that a token sees too"),
        "chunks": (8, "in the context, on which all are trained and asked"),
        "batch": (8, "windows a step"),
        "train-steps": (1500, "of the small models"),
        "align-steps": (300, "of attention outputs, layer by layer"),
        "distil-steps": (800, "of logits"),
        "rank": (8, "of what is added to the matrices of the layers; 0: retrieval alone learns"),
        "examples": (256, "windows of held-out text"),
        "threads": (torch.get_num_threads(), "of torch"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
