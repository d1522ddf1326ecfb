"""Limits of control groups, from trees of files as kernels write them, and of the process itself."""

import math
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evals.isolation.affinity import core_count
from evals.measure.limits import cpu_quota, memory_left_bytes, memory_limit_bytes
from evals.measure.memory import available_bytes

MIB = 2**20
V1_UNLIMITED = 9223372036854771712
V2_MOUNT = "30 23 0:26 {group} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
33 31 0:30 {group} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {group} /sys/fs/cgroup/memory rw,relatime shared:11 - cgroup cgroup rw,memory
40 31 0:37 {group} /sys/fs/cgroup/systemd rw,relatime shared:6 - cgroup cgroup rw,xattr,name=systemd"""


def tree(root: Path, membership: str, mounts: str, files: dict[str, str]) -> Path:
    """Writes a file system with these control groups; `files` are named from /sys/fs/cgroup on."""
    contents = {"proc/self/cgroup": membership, "proc/self/mountinfo": mounts}
    contents |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def memory_v2(limit: int | str, held: int, inactive_file: int = 0, high: int | str = "max") -> dict[str, str]:
    statistics = f"anon {held - inactive_file}\nfile {inactive_file}\ninactive_file {inactive_file}"
    return {"memory.max": str(limit), "memory.high": str(high), "memory.current": str(held), "memory.stat": statistics}


def within(group: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{group}/{name}": text for name, text in files.items()}


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path) is None
    assert memory_left_bytes(tmp_path) == math.inf
    assert cpu_quota(tmp_path) is None


def test_the_least_limit_on_the_way_to_the_root_counts(tmp_path: Path) -> None:
    files = {
        **within("job/step", memory_v2("max", 100 * MIB)),
        **within("job/other", memory_v2(1 * MIB, 1 * MIB)),  # of somebody else
        **within("job", memory_v2(4096 * MIB, 3000 * MIB, inactive_file=1000 * MIB)),
        **within("job/step/task", memory_v2(8192 * MIB, 100 * MIB)),
        "job/step/task/cpu.max": "max 100000",
        "job/step/cpu.max": "150000 100000",
        "job/cpu.max": "400000 100000",
    }
    root = tree(tmp_path, "0::/job/step/task", V2_MOUNT.format(group="/"), files)
    assert memory_limit_bytes(root) == 4096 * MIB
    assert memory_left_bytes(root) == (4096 - 3000 + 1000) * MIB
    assert cpu_quota(root) == 1.5


def test_a_group_that_is_slowed_down_is_limited_there(tmp_path: Path) -> None:
    root = tree(tmp_path, "0::/job", V2_MOUNT.format(group="/"), within("job", memory_v2(900 * MIB, 100 * MIB, high=500 * MIB)))
    assert memory_limit_bytes(root) == 500 * MIB
    assert memory_left_bytes(root) == 400 * MIB


def test_a_full_group_has_nothing_left(tmp_path: Path) -> None:
    root = tree(tmp_path, "0::/", V2_MOUNT.format(group="/"), memory_v2(100 * MIB, 101 * MIB))
    assert memory_left_bytes(root) == 0


@pytest.mark.parametrize(
    ("membership", "mounted"),
    [("0::/", "/"), ("0::/docker/0af3", "/docker/0af3"), ("0::/docker/0af3", "/"), ("0::/../0af3", "/")],
    ids=["own namespace", "host path, mounted from the container on", "host path that is not mounted", "beside the namespace"],
)
def test_a_container_sees_its_limits_however_its_groups_are_mounted(tmp_path: Path, membership: str, mounted: str) -> None:
    files = {**memory_v2(512 * MIB, 12 * MIB), "cpu.max": "50000 100000"}
    root = tree(tmp_path, membership, V2_MOUNT.format(group=mounted), files)
    assert memory_limit_bytes(root) == 512 * MIB
    assert memory_left_bytes(root) == 500 * MIB
    assert cpu_quota(root) == 0.5


@pytest.mark.parametrize("mounted", ["/", "/docker/0af3"])
def test_version_1(tmp_path: Path, mounted: str) -> None:
    group = "" if mounted != "/" else "docker/0af3/"
    statistics = f"inactive_file 0\nhierarchical_memory_limit {700 * MIB}\ntotal_inactive_file {20 * MIB}"
    files = {
        f"memory/{group}memory.limit_in_bytes": str(700 * MIB),
        f"memory/{group}memory.usage_in_bytes": str(120 * MIB),
        f"memory/{group}memory.stat": statistics,
        f"cpu,cpuacct/{group}cpu.cfs_quota_us": "250000",
        f"cpu,cpuacct/{group}cpu.cfs_period_us": "100000",
    }
    if group:  # the roots have no limit
        files |= {"memory/memory.limit_in_bytes": str(V1_UNLIMITED), "memory/memory.usage_in_bytes": str(900 * MIB)}
        files |= {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    path = "/docker/0af3"
    membership = f"12:cpu,cpuacct:{path}\n5:memory:{path}\n1:name=systemd:{path}\n0::{path}"
    root = tree(tmp_path, membership, V1_MOUNTS.format(group=mounted), files)
    assert memory_limit_bytes(root) == 700 * MIB
    assert memory_left_bytes(root) == (700 - 120 + 20) * MIB
    assert cpu_quota(root) == 2.5


def test_a_hybrid_of_both_versions_is_read_as_version_1(tmp_path: Path) -> None:
    mounts = V1_MOUNTS.format(group="/") + "\n41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
    files = {"memory/a/memory.limit_in_bytes": str(64 * MIB), "unified/b/cgroup.procs": "1"}
    root = tree(tmp_path, "4:memory:/a\n2:cpu,cpuacct:/\n0::/b", mounts, files)
    assert memory_limit_bytes(root) == 64 * MIB


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 2), ("20000 100000", 1), ("max 100000", 64), ("12800000 100000", 64)]
)
def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, cores: int) -> None:
    root = tree(tmp_path, "0::/", V2_MOUNT.format(group="/"), {"cpu.max": quota})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr("evals.isolation.affinity.cpu_quota", lambda: cpu_quota(root))
    assert core_count() == cores


@pytest.fixture
def restored_limits() -> Iterator[None]:
    kinds = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    before = [resource.getrlimit(kind) for kind in kinds]
    yield
    for kind, limits in zip(kinds, before, strict=True):
        resource.setrlimit(kind, limits)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
@pytest.mark.usefixtures("restored_limits")
def test_a_resource_limit_bounds_the_available_memory(tmp_path: Path) -> None:
    for kind, held in (
        (resource.RLIMIT_AS, psutil.Process().memory_info().vms),
        (resource.RLIMIT_DATA, psutil.Process().memory_info().data),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (held + 200 * MIB, hard))
        assert memory_limit_bytes(tmp_path) == held + 200 * MIB
        assert 100 * MIB < available_bytes() <= 201 * MIB
        resource.setrlimit(kind, (resource.RLIM_INFINITY, hard))
