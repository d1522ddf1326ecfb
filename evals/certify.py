"""`python -m evals.certify`: does this attention do what an attention promises, before anyone times it?

Checks every variant in `conf/attention/`; `'attention=[bsbr]'` one; `--config-dir my/conf 'attention=[mine]'` one that
lives elsewhere. Shows a table, and for each red check what broke where. Exit code 1 if any is red. What runs only on a GPU
is unsupported, which is not red; `device=cuda` looks at it there.
"""

import sys

from evals.cli import help_text, hydra_app
from evals.cli.certificate_view import Report
from evals.cli.command import command
from evals.paths import CONF


@command()
def main() -> int:
    asked, _ = help_text.known(sys.argv[1:])
    if asked.help:
        print(help_text.text_of_certify(str(__doc__), asked.config_dir))
        return 0
    report = Report()
    if not any(word.startswith("attention=") for word in sys.argv[1:]):
        known = ",".join(sorted(path.stem for path in (CONF / "attention").glob("*.yaml")))
        sys.argv.append(f"attention=[{known}]")
    sys.argv.append("hydra.run.dir=.")  # Hydra makes the folder, and nothing will be written to it
    return hydra_app.run(report.certify, report.conclude)


if __name__ == "__main__":
    # What a child is to call must be of a module with a name: of the imported one.
    from evals.certify import main as certify

    sys.exit(certify())
