"""No attention needs more memory than the committed sweep over sequence length says."""

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from evals.benchmark.workloads import prepare
from evals.cli.jobs import read_job
from evals.measure.memory import peak_allocated_bytes
from evals.paths import CONF, ROOT

SEQ_LEN = 2048
COMMITTED = (
    pd.read_csv(ROOT / "results" / "paper" / "seq_len" / "results.csv").query(f"seq_len == {SEQ_LEN}").set_index("attention")
)


@pytest.mark.parametrize("name", COMMITTED.index)
def test_the_peak_is_at_most_that_of_the_committed_results(name: str) -> None:
    """An intermediate that is kept longer than needed raises the peak, and nothing else tells of it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(compose("config", ["sweep=seq_len", f"attention=[{name}]", f"shape.seq_len={SEQ_LEN}"]))
    call = prepare(comparison, comparison.candidates[0]).work.call
    call()  # compiles or loads code at most once
    assert peak_allocated_bytes(call) <= 1.01 * COMMITTED.loc[name, "peak_bytes"]
