"""`python -m evals.certify`: checks that attentions keep their contract, before anyone times them.

Without arguments it checks every attention of `conf/attention/` and of other installed distributions; `'attention=[bsbr]'` checks
one, and `--config-dir my/conf 'attention=[mine]'` one of your own. It prints a table, and for each failed check the failure and its
position. Exit code 1 if any fails. An attention that this machine cannot run is unsupported, which is no failure; `device=cuda`
checks it on a GPU.
"""

import sys

from evals.certification.checks import CHECKS
from evals.cli import help_text, hydra_app
from evals.cli.certificate_view import CertificateView
from evals.cli.command import command
from evals.errors import OK


@command()
def main() -> int:
    options, _ = help_text.parse_options(sys.argv[1:])
    if options.help:
        descriptions = {check.name: check.description for check in CHECKS}
        print(help_text.certify_help(str(__doc__), descriptions, options.config_dir))
        return OK
    if not any(argument.startswith("attention=") for argument in sys.argv[1:]):
        sys.argv.append(f"attention=[{','.join(help_text.attentions())}]")
    view = CertificateView()
    return hydra_app.run(view.certify, view.conclude)


if __name__ == "__main__":
    sys.exit(main())
