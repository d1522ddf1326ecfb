"""Two commands that share the lock."""

import os
import threading

import pytest

from evals.isolation import locks


def test_rounds_of_unequal_length_stay_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = threading.local()
    monkeypatch.setenv(locks.LOCK_PIPES, "both are threads of this process")
    monkeypatch.setattr(locks, "_pipes", lambda: ends.pipes)
    (first_reads, second_writes), (second_reads, first_writes) = os.pipe(), os.pipe()
    os.write(second_writes, locks.GRANTED)
    done: list[tuple[str, int]] = []

    def measure(name: str, pipes: tuple[int, int], time_slices: list[int]) -> None:
        ends.pipes = pipes
        with locks.exclusive_lock():
            for number, slices in enumerate(time_slices):
                for _ in range(slices):
                    done.append((name, number))
                    locks.yield_lock()
                locks.end_round()
        for end in pipes:
            os.close(end)

    sides = {"base": ((first_reads, first_writes), [1, 5, 1, 3]), "here": ((second_reads, second_writes), [4, 1, 1, 2])}
    threads = [threading.Thread(target=measure, args=(name, *side), daemon=True) for name, side in sides.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert [number for _, number in done] == sorted(number for _, number in done)
    assert [sum(one == (name, 1) for one in done) for name in sides] == [5, 1]
