"""`python -m evals.distill`: what converting costs, and how much of it healing gives back.

For each model and seed: trains a small one from its config, on the bytes of Python's standard library; converts it; heals
that. The three are asked the same held-out text. Settings are chosen with `--split validation`, whose text is of other files, and
whose results lie apart. Every run is a line of results/distillation/samples.jsonl once it is done, and checkpoints
until then, from which the same command goes on; the tables beside it are made from all lines.
`--pretrained gpt2` takes a model of the hub, or a folder, in place of the small ones.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bsbr import convert
from evals.benchmark.code_hash import files_digest, modules_digest
from evals.cli.command import RESUME
from evals.conversion.study import FOLDERS, plans, run, tables, told
from evals.conversion.teachers import MODELS
from evals.errors import one_sentence
from evals.measure import machine
from evals.measure.clock import now
from evals.results.export import Table, markdown
from evals.results.ids import digest
from evals.results.latency_table import write
from evals.results.ledger import Ledger
from evals.training.tasks.corpus import load_corpus

# --- the command --------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    arguments = parsed(words)
    torch.set_num_threads(arguments.threads)
    folder = arguments.results_dir / FOLDERS[arguments.split]
    ledger = Ledger(folder / "samples.jsonl")
    code = [
        modules_digest(
            "evals.conversion.study", "evals.conversion.distill", "evals.conversion.teachers", "evals.training.optimizer"
        )
    ]
    code.append(files_digest(sorted(Path(convert.__file__).parent.glob("*.py"))))
    watch = tqdm(disable=None, leave=False, bar_format="{desc}")
    try:
        for plan in plans(arguments):
            key = digest([asdict(plan), load_corpus().sha256, code, torch.__version__])
            if any(record["run"] == key for record in ledger.read()[0]):
                continue
            checkpoints = folder / "checkpoints" / key
            came_to = run(plan, arguments.results_dir / "checkpoints", checkpoints, watch)
            done = {"kind": "conversion", "run": key, "plan": asdict(plan), **came_to}
            ledger.append(done | {"provenance": machine.provenance(), "time": now()})
            for path in checkpoints.glob("*.safetensors"):
                path.unlink()
    except KeyboardInterrupt:
        print(RESUME, file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return 2
    finally:
        watch.close()
    made = tables(ledger.read()[0])
    for name, table in made.items():
        write(table, folder, name)
    title = f"Perplexity, and how much of what converting cost came back; windows of the {arguments.split} split"
    print(markdown(Table(title, told(made["conversion"]))))
    print(f"\n{folder / 'results.csv'}: {len(made['converted'])} rows")
    return 0


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals.distill", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="which small models")
    parser.add_argument("--pretrained", help="the name or folder of a pretrained model, instead")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), dest="results_dir")
    parser.add_argument("--split", choices=FOLDERS, default="test", help="whose windows all are asked; validation: to choose by")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of healing (1e-2)")
    parser.add_argument(
        "--without-retrieval", action="store_false", dest="retrieval", help="low-rank additions alone are distilled"
    )
    numbers = {
        "seeds": (3, "of each model"),
        "hidden": (64, "width of the small models"),
        "layers": (2, "of the small models"),
        "heads": (4, "of the small models"),
        "chunk-size": (16, "of the conversion, in tokens"),
        "chunk-overlap": (8, "tokens before its chunk that a token sees too"),
        "chunks": (8, "in the context, on which all are trained and asked"),
        "batch": (8, "windows a step"),
        "train-steps": (1500, "of the small models"),
        "align-steps": (300, "of attention outputs, layer by layer"),
        "distil-steps": (2000, "of logits"),
        "rank": (8, "of what is added to the matrices of the layers; 0: retrieval alone learns"),
        "num_eval_examples": (1024, "windows of held-out text"),
        "threads": (torch.get_num_threads(), "of torch"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
