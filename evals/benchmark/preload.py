"""What the forkserver imports, once, before it forks: all that a measurement needs, and none of what draws or tabulates.

torch._dynamo is what torch's profiler imports when it first starts, which takes a second.
"""

import gc

from evals.isolation.forkserver import end_with_parent

# Children that are stopped keep their server from noticing that the command was killed; and a command that ends soon, because
# of a mistake in it or with nothing to measure, has no use for what is still being imported.
end_with_parent()

import torch._dynamo  # noqa: E402, F401

import evals.benchmark.preflight  # noqa: E402
import evals.benchmark.rounds  # noqa: E402
import evals.certification.certificate  # noqa: E402, F401

# Children need not search what lies here for garbage: to do so took 0.3 s in each of them, and made their pages their own.
gc.freeze()
