"""What is converted: small models, trained from their configs on the bytes of Python's standard library, or pretrained ones."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from evals.benchmark.code_hash import modules_digest
from evals.results.ids import digest
from evals.training.optimizer import OptimizerSettings, minimize
from evals.training.tasks.base import Split, generator
from evals.training.tasks.corpus import load_corpus

MODELS = ("gpt2", "llama")
Texts = dict[Split, NDArray[Any]]


@dataclass(frozen=True)
class Teacher:
    """What an original depends on, apart from the code. model: one of `MODELS`, or if `pretrained`, a name or folder."""

    model: str
    pretrained: bool
    seed: int
    hidden: int
    layers: int
    heads: int
    context: int
    batch: int
    train_steps: int

    @property
    def file(self) -> str:
        """Where one that was trained is kept: all that need the same one find it."""
        key = digest(
            [
                asdict(self),
                load_corpus().sha256,
                modules_digest("evals.conversion.teachers", "evals.training.optimizer"),
                torch.__version__,
            ]
        )
        return f"{self.model}-seed-{self.seed}-{key}.safetensors"

    def untrained(self) -> PreTrainedModel:
        """Of bytes. Without dropout: a model of this size learns too little of so much text to need it."""
        gpt2 = {
            "n_embd": self.hidden,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_positions": self.context,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
        llama = {
            "hidden_size": self.hidden,
            "intermediate_size": 5 * self.hidden // 2,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "max_position_embeddings": self.context,
        }
        sizes: dict[str, Any] = gpt2 if self.model == "gpt2" else llama
        config = AutoConfig.for_model(self.model, vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes)
        torch.manual_seed(self.seed)
        return AutoModelForCausalLM.from_config(config)

    def texts(self) -> Texts:
        """The corpus, as the model reads it."""
        splits = load_corpus().splits
        if not self.pretrained:
            return dict(splits)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        return {
            split: np.array(tokenizer(text.tobytes().decode("utf-8", "replace"))["input_ids"]) for split, text in splits.items()
        }


def pretrained(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)


def train(model: PreTrainedModel, original: Teacher, texts: Texts, saved: Path) -> Iterator[tuple[int, float]]:
    """Trains `model` in place; yields every step with its loss. saved: its checkpoint, which stays: none is trained twice."""

    def loss_of(step: int) -> Tensor:
        ids = windows(texts, "train", original.batch, original.context, "train", original.seed, step)
        return nats(model(ids, use_cache=False).logits[:, :-1], ids).mean()

    yield from minimize(model, loss_of, OptimizerSettings(original.train_steps, 3e-3), saved, weight_decay=0.1)


def nats(logits: Tensor, ids: Tensor) -> Tensor:
    """−log p of every token but the first [batch, context − 1], from the logits for them."""
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def windows(texts: Texts, split: Split, batch: int, context: int, *draw: int | str) -> Tensor:
    """Token ids [batch, context] from random places of a split, which follow from `draw` alone."""
    text = texts[split]
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator("conversion", *draw))
    return torch.from_numpy(text[(starts + torch.arange(context)).numpy()]).long()
