"""Measuring: time, memory, FLOPs and the machine. Only these modules read a clock or a memory counter."""

from collections.abc import Callable

Work = Callable[[], object]
"""One call of the measured work."""
