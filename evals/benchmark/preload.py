"""Imported once by the fork server before it forks: all that a measurement needs, and nothing that draws or tabulates."""

import gc

from evals.isolation.forkserver import end_with_parent

# Stopped children keep the server from noticing that its command was killed. And a command that ends early, because of a mistake
# or with nothing to measure, has no use for a server that still imports.
end_with_parent()

import torch._dynamo  # noqa: E402, F401  torch's profiler imports it at its first start, which takes a second

import evals.benchmark.preflight  # noqa: E402
import evals.benchmark.rounds  # noqa: E402
import evals.certification.certificate  # noqa: E402, F401

# Children need not search these objects for garbage: that took 0.3 s in each, and copied the pages that they share.
gc.freeze()
