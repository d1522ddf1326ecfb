"""A sweep on a real Ray cluster: a head that takes no task, and two nodes, of which one dies under its task."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from evals.errors import INCOMPLETE
from tests.clusters.sweeps import LONG, sweep

pytestmark = LONG


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator["object"]:
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="NOT TESTED: Ray is not installed (pip install .[ray])")
    # It dies as of a power cut: no message to anyone, and what it does not answer for so long is gone.
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Its sockets lie deep in its folder, and the name of a socket may have 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_sweep_ends_though_a_node_dies_under_it(cluster: "object", tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=1, resources={"machine": 1}) for _ in range(2)]  # type: ignore[attr-defined]
    running = sweep(tmp_path, os.environ | {"RAY_ADDRESS": cluster.address}, "launcher=ray")  # type: ignore[attr-defined]
    running.wait_for(lambda: running.records("latency"))
    cluster.remove_node(nodes[0], allow_graceful=False)  # type: ignore[attr-defined]
    _, table = running.end()
    assert sorted(zip(table["attention"], table["seq_len"], strict=True)) == [
        ("linear", 60),
        ("linear", 129),
        ("standard", 60),
        ("standard", 129),
    ]
    assert (table["outcome"] == "ok").all()
    # Each node had one, and one of the two was started again.
    assert sorted({record["job"] for record in running.records("started")}) == [0, 1]
    assert len(running.records("started")) == 3
    assert sorted(record["job"] for record in running.records("ended")) == [0, 1]


def test_what_is_lost_twice_is_a_row_with_the_reason(cluster: "object", tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1, resources={"machine": 1})  # type: ignore[attr-defined]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}  # type: ignore[attr-defined]
    running = sweep(tmp_path, environment, "launcher=ray", "shape.seq_len=129", "attention=[standard]")
    for start in (1, 2):
        running.wait_for(lambda: len(running.records("started")) == start)  # noqa: B023  it is called at once
        cluster.remove_node(node, allow_graceful=False)  # type: ignore[attr-defined]
        node = cluster.add_node(num_cpus=1, resources={"machine": 1})  # type: ignore[attr-defined]
    said, table = running.end(INCOMPLETE)
    assert table[["attention", "seq_len", "outcome"]].to_numpy().tolist() == [["standard", 129, "lost"]]
    assert "lost with its node" in table["detail"][0]
    assert "lost" in said
