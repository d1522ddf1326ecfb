"""Measurements apart from each other: worker processes, locks on cores and GPUs, CPU affinity, scratch folders."""
