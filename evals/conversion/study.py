"""The study of `python -m evals.distill`: for each plan, a teacher, its conversion, the distillation and their evaluation."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bsbr import convert
from bsbr.convert import convert_to_bsbr
from evals.benchmark.code_hash import files_digest, modules_digest
from evals.conversion.distill import count_trained_parameters, distill
from evals.conversion.evaluation import evaluate
from evals.conversion.modules import retrievals
from evals.conversion.teachers import MODELS, Teacher, Texts, draw_windows, load_pretrained, train
from evals.measure import machine
from evals.measure.clock import now
from evals.results.ids import digest
from evals.results.ledger import Ledger, Record
from evals.training.optimizer import OptimizerSettings
from evals.training.tasks.base import Split
from evals.training.tasks.corpus import load_corpus

FOLDERS: dict[Split, str] = {"test": "distillation", "validation": "distillation_validation"}
"""Folder of the results, by the split that the models are evaluated on."""

MODULES = (
    *("evals.conversion.study", "evals.conversion.distill", "evals.conversion.evaluation", "evals.conversion.modules"),
    *("evals.conversion.teachers", "evals.training.optimizer"),
)
"""Modules that determine the result of a run, besides `bsbr.convert`: a run is repeated if their code changes."""

DISTILLATION_WINDOWS, EVALUATION_WINDOWS = "heal", "asked"
"""Parts of the random seeds of windows; any change draws different windows, and the published numbers could not be reproduced."""

Report = Callable[[str], object]
"""Receives one line about the progress."""


@dataclass(frozen=True)
class DistillationPlan:
    """All settings of a run; `NUMBERS` explains those that are whole numbers."""

    teacher: Teacher
    chunk_size: int
    chunk_overlap: int
    chunks: int
    batch: int
    align_steps: int
    distil_steps: int
    learning_rate: float  # peak of both stages
    rank: int
    retrieval: bool  # whether the parameters of retrieval are trained too
    split: Split  # the text that the models are evaluated on
    num_eval_examples: int

    @property
    def key(self) -> str:
        """Key of the run in the ledger."""
        code = [modules_digest(*MODULES), files_digest(sorted(Path(convert.__file__).parent.glob("*.py")))]
        return digest([asdict(self), load_corpus().sha256, code, torch.__version__])


NUMBERS = {
    "seeds": (3, "runs of each model"),
    "hidden": (64, "width of the small models"),
    "layers": (2, "layers of the small models"),
    "heads": (4, "heads of the small models"),
    "chunk-size": (16, "tokens of a chunk of the conversion"),
    "chunk-overlap": (8, "tokens before its chunk that a token sees, too"),
    "chunks": (8, "chunks of the context in training and evaluation"),
    "batch": (8, "windows per step"),
    "train-steps": (1500, "steps that train a small model"),
    "align-steps": (300, "steps on attention outputs, layer by layer"),
    "distil-steps": (2000, "steps on logits"),
    "rank": (8, "rank of the update of each weight matrix; 0: only retrieval is trained"),
    "num-eval-examples": (1024, "windows of held-out text"),
    "threads": (torch.get_num_threads(), "threads of torch"),
}
"""Options that are whole numbers: default and meaning."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `plans` reads, the results folder and the threads."""
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="small models (all)")
    parser.add_argument("--pretrained", help="name or folder of a pretrained model, instead of small ones")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="folder of all results (results)")
    parser.add_argument("--split", choices=FOLDERS, default="test", help="text to evaluate on; validation: to choose settings by")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="peak learning rate of the distillation (0.01)")
    parser.add_argument("--without-retrieval", action="store_false", dest="retrieval", help="train only the low-rank updates")
    for name, (default, meaning) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")


def plans(arguments: argparse.Namespace) -> Iterator[DistillationPlan]:
    """Plans of a command line, one per model and seed."""
    given = vars(arguments)
    distillation = {field.name: given[field.name] for field in fields(DistillationPlan) if field.name in given}
    teacher = {field.name: given[field.name] for field in fields(Teacher) if field.name in given and field.name != "model"}
    teacher |= {"pretrained": bool(arguments.pretrained), "context": arguments.chunks * arguments.chunk_size}
    for name in [arguments.pretrained] if arguments.pretrained else arguments.model:
        for seed in range(arguments.seeds):
            yield DistillationPlan(Teacher(**{**teacher, "model": name, "seed": seed}), **distillation)


def run_all(all_plans: Iterable[DistillationPlan], results_dir: Path, folder: Path, report: Report) -> list[Record]:
    """Runs the plans that the ledger has no run of, and appends each run to it; returns all records.

    Args:
        all_plans: the plans.
        results_dir: contains `checkpoints`, the folder of trained teachers.
        folder: contains the ledger and the checkpoints of unfinished distillations.
        report: receives the progress.
    """
    ledger = Ledger(folder / "samples.jsonl")
    for plan in all_plans:
        key = plan.key
        if any(record["run"] == key for record in ledger.read()[0]):
            continue
        checkpoints = folder / "checkpoints" / key
        results = run(plan, results_dir / "checkpoints", checkpoints, report)
        record = {"kind": "conversion", "run": key, "plan": asdict(plan), **results}
        ledger.append(record | {"provenance": machine.provenance(), "time": now()})
        for path in checkpoints.glob("*.safetensors"):
            path.unlink()
    return ledger.read()[0]


def run(plan: DistillationPlan, teacher_folder: Path, checkpoint_folder: Path, report: Report) -> Record:
    """Runs one plan.

    Returns:
        `models`, the evaluation of the original, converted and distilled model; `parameters`, the number of the original's;
        `trained_parameters`, the number that the distillation trained; `mean_gate`, the mean absolute gate of each attention.
    """
    teacher, texts = plan.teacher, plan.teacher.load_texts()
    name = f"{teacher.model}, seed {teacher.seed}"
    original = _original_model(teacher, texts, teacher_folder, lambda line: report(f"{name}: {line}"))
    torch.manual_seed(teacher.seed)
    converted = convert_to_bsbr(original, plan.chunk_size, chunk_overlap=plan.chunk_overlap)
    models = {"original": original, "converted": deepcopy(converted), "distilled": converted}
    trained_parameters = 0
    steps = distill(
        original,
        converted,
        lambda step: draw_windows(texts, "train", plan.batch, teacher.context, DISTILLATION_WINDOWS, teacher.seed, step),
        align=OptimizerSettings(plan.align_steps, plan.learning_rate),
        distil=OptimizerSettings(plan.distil_steps, plan.learning_rate),
        rank=plan.rank,
        train_retrieval=plan.retrieval,
        checkpoint_folder=checkpoint_folder,
    )
    for step in steps:
        trained_parameters = trained_parameters or count_trained_parameters(converted)
        report(f"{name}: {step.stage} {step.step}, loss {step.loss:.4f}")
    # The same windows for every seed.
    windows = [
        draw_windows(texts, plan.split, plan.batch, teacher.context, EVALUATION_WINDOWS, plan.split, start)
        for start in range(0, plan.num_eval_examples, plan.batch)
    ]
    results = evaluate(original, models, windows, plan.chunk_size)
    gates = [float(retrieval.gate.detach().abs().mean()) for retrieval in retrievals(converted)]
    parameters = sum(parameter.numel() for parameter in original.parameters())
    return {"models": results, "parameters": parameters, "trained_parameters": trained_parameters, "mean_gate": gates}


def _original_model(teacher: Teacher, texts: Texts, folder: Path, report: Report) -> PreTrainedModel:
    """The teacher's model in eval mode: loaded from the hub, or trained from its last checkpoint on."""
    if teacher.pretrained:
        model = load_pretrained(teacher.model)
    else:
        model = teacher.build()
        for step, loss in train(model, teacher, texts, folder / teacher.checkpoint_name):
            report(f"train {step}, loss {loss:.4f}")
    return model.eval()
