"""Each tracker's reader returns the numbers of the exported table."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from evals.errors import UsageError
from evals.results import trackers

RESULTS = pd.DataFrame(
    {
        "attention": ["standard", "bsbr", "standard", "bsbr", "linear"],
        "swept": "shape.seq_len",
        "seq_len": [129, 129, 60, 60, 60],
        "outcome": ["ok", "ok", "ok", "ok", "oom"],
        "latency_s": [3e-3, 2e-3, 1e-3, 1.5e-3, math.nan],
        "speedup": [1.0, 1.5, 1.0, math.nan, math.nan],
    }
)
CURVES = pd.DataFrame(
    {"attention": "bsbr", "learning_rate": 3e-3, "seed": 0, "seq_len": 60, "step": [10, 20, 30], "loss_nats": [3.0, 2.5, 2.25]}
)
HELD = {
    "standard": {"latency_s": {60: 1e-3, 129: 3e-3}, "speedup": {60: 1.0, 129: 1.0}},
    "bsbr": {"latency_s": {60: 1.5e-3, 129: 2e-3}, "speedup": {129: 1.5}},
    "curves/bsbr/0.003/0/60": {"loss_nats": {10: 3.0, 20: 2.5, 30: 2.25}},
}


def test_tensorboard_holds_every_number(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="NOT TESTED: no tensorboard")
    trackers.tensorboard(RESULTS, None, sweep="mine", folder=tmp_path)
    target = trackers.tensorboard(RESULTS, CURVES, sweep="mine", folder=tmp_path)  # again: replaces the first
    held = {}
    for events in target.rglob("events*"):
        read = reader.EventAccumulator(str(events)).Reload()
        name = str(events.parent.relative_to(target))
        assert name not in held
        held[name] = {
            tag.removeprefix("mine/"): {event.step: pytest.approx(event.value) for event in read.Scalars(tag)}
            for tag in read.Tags()["scalars"]
        }
    assert held == HELD


@pytest.mark.filterwarnings("ignore")  # the client's own dependencies deprecate what it does
def test_mlflow_holds_every_number(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="NOT TESTED: no mlflow")
    trackers.mlflow(RESULTS, CURVES, sweep="mine", folder=tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("bsbr/mine")
    held = {
        run.info.run_name: {
            name: {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
            for name in run.data.metrics
        }
        for run in client.search_runs([experiment.experiment_id])
    }
    assert held == HELD


@pytest.mark.filterwarnings("ignore")
def test_wandb_holds_every_number(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="NOT TESTED: no wandb")
    from wandb.proto import wandb_internal_pb2

    target = trackers.wandb(RESULTS, CURVES, sweep="mine", folder=tmp_path)
    held: dict[str, dict[str, dict[int, float]]] = {}
    for file in target.glob("offline-run-*/*.wandb"):
        name, numbers = "", {}
        for data in logged(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            name = record.run.display_name or name
            for item in record.history.item:
                key = item.key or ".".join(item.nested_key)
                if not key.startswith("_"):
                    numbers.setdefault(key, {})[record.history.step.num] = float(item.value_json)
        held[name] = numbers
    assert held == HELD


def logged(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: 7 bytes of file header, then blocks of 32 KiB. Each piece of a record has a
    checksum, its length, and its kind: whole (1), beginning (2), middle (3) or end (4)."""
    position, record = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_a_setting_that_is_no_number_is_a_parameter_of_the_run() -> None:
    table = RESULTS.assign(swept="device.dtype", dtype=["float32", "float32", "bfloat16", "bfloat16", "float32"])
    standard = next(one for one in trackers.to_series(table) if one.name == "standard")
    assert [step for step, _ in standard.points] == [0, 1]
    assert standard.parameters == {"swept": "dtype", "dtype": ["float32", "bfloat16"]}


def test_a_missing_client_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"^tracker=no_such needs its client, which is not installed: pip install no_such$"):
        trackers.import_client("no_such")
