"""The function `evals.compare`, for notebooks and scripts. The command `python -m evals.compare` is in `__main__`.

Imports nothing at its top, since every import of `evals` runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from bsbr.interface import Attention
    from evals.api.results import Results

    AttentionOrName = str | type[Attention]
    Choice = (
        AttentionOrName
        | tuple[AttentionOrName, Mapping[str, Any]]
        | tuple[str, AttentionOrName]
        | tuple[str, AttentionOrName, Mapping[str, Any]]
    )


def compare(
    attentions: Sequence[Choice],
    *,
    seq_len: int | Sequence[int] | None = None,
    batch_size: int | Sequence[int] | None = None,
    hidden_dim: int | Sequence[int] | None = None,
    num_heads: int | Sequence[int] | None = None,
    dtype: str | torch.dtype | Sequence[str | torch.dtype] | None = None,
    threads: int | Sequence[int] | None = None,
    workload: str = "prefill",
    device: str = "cpu",
    sampling: str = "default",
    relative_to: str | None = None,
    match: str | None = None,
    settings: Mapping[str, Any] | None = None,
    results_dir: str | Path = "results",
    sweep_name: str | None = None,
    quiet: bool = False,
) -> Results:
    """Certifies attentions and measures them side by side, as `python -m evals.run` does, and returns the results.

    What the result folder already holds is not measured again. After an interruption the same call continues. One interruption
    (Ctrl-C, or stop in a notebook) ends the measurement after the running round, a second one at once.

        evals.compare(["standard", "bsbr", MyAttention], seq_len=[512, 2048, 8192])
        evals.compare(["standard", ("bsbr", {"chunk_size": 64}), ("bsbr_32", "bsbr", {"chunk_size": 32})], seq_len=4096)

    Args:
        attentions: each is a name of `conf/attention`, or a class. A tuple adds another name before it, or a dictionary of its
            options behind it. A class may be defined in a notebook or in the script that runs.
        seq_len, batch_size, hidden_dim, num_heads, dtype, threads: sizes of the comparison. A list is swept; the first list is the
            x axis of figures. By default they are those of `conf`.
        workload: what is timed: prefill, decode, attention, forward_backward, train_step.
        device: cpu or cuda.
        sampling: quick, default or careful.
        relative_to: name of the attention that speed-ups are relative to; by default `standard`, or the first if that is not there.
        match: `"params"` gives every attention the same number of parameters.
        settings: any further settings of the command line, such as `{"model.scope": "layer", "sampling.budget_s": 5}`.
        results_dir: folder of all results.
        sweep_name: folder in it; by default the name of the first list, such as seq_len.
        quiet: shows no progress bar.

    Returns:
        The results of these attentions at these sizes. An attention that failed has a row with its outcome.

    Raises:
        ValueError: in one sentence, for arguments that cannot be measured. It is an `evals.errors.UsageError`.
        KeyboardInterrupt: after an interruption. Complete rounds are kept.
    """
    from pathlib import Path

    from evals.api.run import measure  # here: it imports torch

    sizes = {
        "seq_len": seq_len,
        "batch_size": batch_size,
        "hidden_dim": hidden_dim,
        "num_heads": num_heads,
        "dtype": dtype,
        "threads": threads,
    }
    groups = {"workload": workload, "device": device, "sampling": sampling}
    others = {"relative_to": relative_to, "match": match, "quiet": quiet, **(settings or {})}
    return measure(attentions, sizes, groups | others, Path(results_dir), sweep_name)


def load(folder: str | Path) -> Results:
    """Reads the results of a folder that `evals.compare` or `python -m evals.run` wrote.

    Raises:
        ValueError: in one sentence, if it is no result folder.
    """
    from pathlib import Path

    from evals.api.results import Results  # here: it imports pandas and matplotlib

    return Results(Path(folder))
