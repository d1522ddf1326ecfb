"""`python -m evals.run sweep=seq_len`: compares attentions, one Hydra job a comparison, and shows what came out.

Raw samples go to results/<sweep>/samples.jsonl while they are made; started again, the same command goes on from
there. From them come results/<sweep>/results.csv, the tables on the screen and plots/<sweep>/. Ctrl-C ends the sweep
after the round that is running, and shows what there is; a second one ends it at once. --dry-run tells what would be done.
"""

import sys

from evals import forkserver


def main() -> int:
    # It imports in the background what measuring needs, while this process imports what it needs itself.
    forkserver.start()
    from evals.sweep import main as sweep

    return sweep()


if __name__ == "__main__":
    sys.exit(main())
