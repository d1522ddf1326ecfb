"""What the forkserver imports, once, before it forks: all that a measurement needs, and none of what draws or tabulates.

torch._dynamo is what torch's profiler imports when it first starts, which takes a second.
"""

import gc

import torch._dynamo  # noqa: F401

import evals.certify
import evals.rounds
import evals.trials  # noqa: F401
from evals.forkserver import end_with_parent

# Children that are stopped keep their server from noticing that the command was killed.
end_with_parent()

# Children need not search what lies here for garbage: to do so took 0.3 s in each of them, and made their pages their own.
gc.freeze()
