"""`python -m evals.run sweep=seq_len`: compares attentions, one Hydra job a comparison, and shows what came out.

Raw samples go to results/<sweep>/samples.jsonl while they are made; started again, the same command goes on from
there. From them come results/<sweep>/results.csv, the tables on the screen and plots/<sweep>/. Ctrl-C ends the sweep
after the round that is running, and shows what there is; a second one ends it at once. --dry-run tells what would be done.
"""

import sys
from pathlib import Path

from evals.cli import help_text
from evals.cli.command import RESUME, command
from evals.errors import OK, UsageError
from evals.isolation import forkserver
from evals.paths import CONF


@command(interrupted=RESUME)
def main() -> int:
    asked, others = help_text.known(sys.argv[1:])
    if asked.help and asked.config_dir and not asked.config_dir.is_dir():
        raise UsageError(f"--config-dir must name a folder, such as mine/conf, got {asked.config_dir}")
    if asked.help:
        print(help_text.text(str(__doc__), asked.config_dir))
        return OK
    if asked.shell_completion and others == ["install=bash"]:
        print(Path(__file__).with_name("completion.bash").read_text())
        return OK
    if asked.shell_completion:  # Hydra's work alone
        import hydra

        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(lambda _: None)()
        return OK
    # It imports in the background what measuring needs, while this process imports what it needs itself.
    forkserver.start()
    from evals.cli.sweep import main as sweep

    return sweep()


if __name__ == "__main__":
    sys.exit(main())
