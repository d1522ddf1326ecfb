"""`python -m evals.run sweep=seq_len`: measures the comparisons of a sweep, and shows and draws the results.

Raw samples go to `results/<sweep>/samples.jsonl` as soon as they are measured. The results of all samples are in
`results/<sweep>/results.csv`, on the screen, in the report `results/<sweep>/report.html` and in `plots/<sweep>/`.

Ctrl-C stops after the running round and shows the results so far; a second Ctrl-C stops at once. The same command then continues
where it stopped. `--dry-run` prints what would be measured.
"""

import sys
from pathlib import Path

from evals.cli import help_text
from evals.cli.command import RESUME, command
from evals.cli.commands import modules
from evals.cli.registered import register_attentions
from evals.errors import OK
from evals.isolation import forkserver
from evals.paths import CONF


@command(interrupted=RESUME)
def main() -> int:
    options, others = help_text.parse_options(sys.argv[1:])
    if options.help:
        print(help_text.run_help(str(__doc__), options.config_dir))
        return OK
    if options.shell_completion and others == ["install=bash"]:
        script = Path(__file__).with_name("completion.bash").read_text(encoding="utf-8")
        print(script.replace("@COMMANDS@", " ".join(modules())))
        return OK
    if options.shell_completion:  # Hydra answers it alone
        import hydra  # slow to import, and --help does not need it

        register_attentions()
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(lambda _: None)()
        return OK
    # The server imports what measuring needs in the background, while this process imports the rest.
    forkserver.start()
    from evals.cli.sweep import main as run_sweeps

    return run_sweeps()


if __name__ == "__main__":
    sys.exit(main())
