"""Teachers of a distillation: small models trained from their configs on Python's standard library, or pretrained ones."""

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
"""Architectures of the small models."""

LEARNING_RATE = 3e-3
"""Peak learning rate of small models."""

Texts = dict[Split, NDArray[Any]]
"""Token ids of each split."""


@dataclass(frozen=True)
class Teacher:
    """All settings of a teacher."""

    model: str  # one of `MODELS`; if `pretrained`, a name on the hub or a folder
    pretrained: bool  # loaded instead of trained
    seed: int  # of the parameters and the order of the text
    hidden: int
    layers: int
    heads: int
    context: int  # tokens of a window
    batch: int  # windows per step
    train_steps: int

    @property
    def checkpoint_name(self) -> str:
        """File name of a trained teacher's checkpoint, the same for every run that needs this teacher."""
        code = modules_digest("evals.conversion.teachers", "evals.training.optimizer")
        key = digest([asdict(self), load_corpus().sha256, code, torch.__version__])
        return f"{self.model}-seed-{self.seed}-{key}.safetensors"

    def build(self) -> PreTrainedModel:
        """Builds the small model over bytes, untrained.

        It has no dropout: a model of this size learns too little of so much text to need any.
        """
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

    def load_texts(self) -> Texts:
        """Loads the corpus as token ids of the model: bytes for a small one, else of its tokenizer."""
        splits = load_corpus().splits
        if not self.pretrained:
            return dict(splits)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        return {
            split: np.array(tokenizer(text.tobytes().decode("utf-8", "replace"))["input_ids"]) for split, text in splits.items()
        }


def load_pretrained(name: str) -> PreTrainedModel:
    """Loads a causal language model from the hub or a folder, from safetensors."""
    return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)


def train(model: PreTrainedModel, teacher: Teacher, texts: Texts, checkpoint_path: Path) -> Iterator[tuple[int, float]]:
    """Trains a small model in place, from the checkpoint on if it exists; yields the number of each step, from 1, and its loss.

    The checkpoint of the last step is not deleted, so that no teacher is trained twice.
    """

    def loss_of(step: int) -> Tensor:
        ids = draw_windows(texts, "train", teacher.batch, teacher.context, "train", teacher.seed, step)
        return token_losses(model(ids, use_cache=False).logits[:, :-1], ids).mean()

    settings = OptimizerSettings(teacher.train_steps, LEARNING_RATE)
    yield from minimize(model, loss_of, settings, checkpoint_path, weight_decay=0.1)


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy in nats of every token but the first.

    Args:
        logits: [batch, context − 1, vocabulary], for these tokens.
        ids: [batch, context].

    Returns:
        [batch, context − 1].
    """
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def draw_windows(texts: Texts, split: Split, batch: int, context: int, *seed: int | str) -> Tensor:
    """Draws token ids [batch, context] at random positions of a split; the parts of `seed` determine the positions."""
    text = texts[split]
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator("conversion", *seed))
    return torch.from_numpy(text[(starts + torch.arange(context)).numpy()]).long()
