"""The search for the longest sequence that fits: the bisection itself, and a search on attentions of known memory."""

from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from evals.benchmark.certificates import Certificates
from evals.benchmark.max_context import ContextSearch, longest_fitting
from evals.cli.jobs import read_job
from evals.config import Comparison
from evals.paths import CONF
from evals.results import max_context_table
from evals.results.ledger import Ledger


@pytest.mark.parametrize("start", [1, 7, 64, 1000, 65536])
@pytest.mark.parametrize("edge", [1, 2, 3, 63, 64, 65, 999, 4096, 100_003])
def test_the_result_is_within_an_eighth_of_a_doubling_of_the_edge(start: int, edge: int) -> None:
    tried: list[int] = []

    def fits(seq_len: int) -> bool:
        tried.append(seq_len)
        return seq_len <= edge

    longest = longest_fitting(fits, start)
    assert longest is not None
    # Rounding to whole tokens moves a length by half of one.
    assert edge / 2 ** (1 / 8) - 1 <= longest <= edge
    assert longest in tried
    assert all(seq_len >= 1 for seq_len in tried)
    assert len(tried) <= 22  # 16 doublings between the ends, and 3 steps within the last


def test_a_search_without_an_edge_and_one_in_which_nothing_fits() -> None:
    assert longest_fitting(lambda _: False, 100) is None
    assert longest_fitting(lambda seq_len: True, 100, max_tokens=1000) == 1600


def comparison(*overrides: str) -> Comparison:
    small = ("sweep=max_context", "model.hidden_dim=32", "model.num_heads=2", "shape.seq_len=100", "device.threads=1")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return read_job(compose("config", [*small, *overrides]))


def run_search(folder: Path, searched: Comparison) -> tuple[list[dict[str, object]], pd.DataFrame]:
    ledger = Ledger(folder / "samples.jsonl")
    records = list(ContextSearch(searched, ledger, Certificates(folder / "certificates.jsonl")).run(lambda message, share: None))
    return records, max_context_table.build(ledger.read()[0])


def test_the_result_fits_and_the_next_length_does_not_and_no_length_is_tried_twice(tmp_path: Path) -> None:
    searched = comparison("attention=[standard]", "sampling.memory_limit_gib=0.0005")
    _, table = run_search(tmp_path, searched)
    (row,) = table.to_dict("records")
    assert (row["outcome"], row["next_outcome"]) == ("ok", "limit")
    assert row["peak_bytes"] <= row["limit_bytes"] == int(0.0005 * 2**30)
    assert row["max_context"] < row["next_seq_len"] <= 1.1 * row["max_context"] + 1
    # Allocated at once: four weights, the input, and q, k, v and what is attended to, all of it float32.
    assert row["max_context"] <= (row["limit_bytes"] / 4 - 4 * 32 * 32) / (4 * 32)
    assert "needs " in row["detail"]
    assert max_context_table.render(table).splitlines()[1].split()[:2] == ["standard", str(row["max_context"])]
    again, same = run_search(tmp_path, searched)
    assert [record["kind"] for record in again] == ["search"]
    pd.testing.assert_frame_equal(same, table)


def test_a_row_gives_the_reason_if_nothing_fits(tmp_path: Path) -> None:
    _, table = run_search(tmp_path, comparison("attention=[standard]", "sampling.memory_limit_gib=0.00001"))
    (row,) = table.to_dict("records")
    assert row["outcome"] == "limit"
    assert pd.isna(row["max_context"])
    assert (row["next_seq_len"], row["next_outcome"]) == (1, "limit")
    assert "none" in max_context_table.render(table)
