"""The display of a running sweep: a table that fills, on a terminal; lines, in a log; or nothing.

The table is redrawn between rounds only. This process does nothing while candidates are timed, so it takes no time from what
is measured. The terminal stays in its normal mode, so a command that is killed leaves it intact.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from evals.cli.progress import ProgressTable
from evals.results.formatting import shorten
from evals.results.ledger import Record

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.progress import TaskID


def make_display(jobs: int, *, quiet: bool) -> "Display":
    """The display that suits standard output. jobs: number of comparisons of the command."""
    if quiet:
        return Display()
    return TableDisplay(jobs) if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else LogDisplay()


class Display:
    """Shows nothing of running comparisons; base class of the displays that do. `begin` and `end` enclose one comparison."""

    table: ProgressTable

    def begin(self, title: str, conditions: str, table: ProgressTable) -> None:
        """Starts a comparison. title: its number and swept setting, such as [2/7] seq_len=256."""
        self.table = table

    def report(self, message: str, share: float) -> None:
        """Shows the job's next step. share: finished part of all comparisons, from 0 to 1."""

    def add(self, record: Record) -> None:
        """Takes in a record of the job."""
        self.table.add(record)

    def end(self, *, finished: bool) -> None:
        """Ends the comparison. finished: False after an interruption or an error."""

    def notify(self, message: str) -> None:
        """Prints a message on standard error. May be called by a signal handler."""
        print(message, file=sys.stderr)

    def close(self) -> None:
        """Ends the display of all comparisons."""


class BarDisplay(Display):
    """Shows one progress bar over all comparisons, in a notebook or on a terminal, and a line per failure."""

    def __init__(self, jobs: int) -> None:
        from tqdm.auto import tqdm

        self.jobs = jobs
        self.bar = tqdm(total=jobs, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")

    def begin(self, title: str, conditions: str, table: ProgressTable) -> None:
        super().begin(title, conditions, table)
        self.title = title

    def report(self, message: str, share: float) -> None:
        self.bar.set_description_str(f"{self.title} {message}", refresh=False)
        self.bar.n = share * self.jobs
        self.bar.refresh()

    def add(self, record: Record) -> None:
        line = self.table.add(record)
        if line is not None and record["outcome"] != "ok":
            self.bar.write(line)

    def end(self, *, finished: bool) -> None:
        if finished:
            self.bar.set_description_str(self.title)

    def close(self) -> None:
        self.bar.close()


class LogDisplay(Display):
    """Prints a line when a comparison begins, one per noteworthy record, and one at its end."""

    def begin(self, title: str, conditions: str, table: ProgressTable) -> None:
        super().begin(title, conditions, table)
        print(f"{title}: {conditions}", flush=True)

    def add(self, record: Record) -> None:
        line = self.table.add(record)
        if line is not None:
            print(line, flush=True)

    def end(self, *, finished: bool) -> None:
        if finished and self.table.footnote():
            print(f"  {self.table.footnote()}", flush=True)


class TableDisplay(Display):
    """Shows every attention of the comparison with its values so far, and below it a progress bar over all comparisons."""

    def __init__(self, jobs: int) -> None:
        # Only a terminal needs rich, and importing it would delay the first measurement in a log.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self.console = Console(highlight=False)
        message = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = (message, BarColumn(16), TaskProgressColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, auto_refresh=False, expand=True, speed_estimate_period=600)
        self.task: TaskID = self.progress.add_task("", total=1.0)
        self.live: Live | None = None
        self.is_drawing = False
        self.pending_messages: list[str] = []

    def begin(self, title: str, conditions: str, table: ProgressTable) -> None:
        from rich.text import Text

        super().begin(title, conditions, table)
        self.number = title.partition(" ")[0]
        self.console.print(Text.assemble((title, "bold"), f": {conditions}"))

    def report(self, message: str, share: float) -> None:
        self.progress.update(self.task, description=f"{self.number} {message}", completed=share)
        with self._drawing():
            self._draw()

    def add(self, record: Record) -> None:
        line = self.table.add(record)
        with self._drawing():
            if line is not None and record["outcome"] != "ok":  # the table has no room for the reason
                self.console.print(line, markup=False)
            if record["kind"] != "latency":  # those of a round come together, and `report` follows
                self._draw()

    def end(self, *, finished: bool) -> None:
        with self._drawing():
            if self.live is not None:
                self.live.update(self._rows())
                self.live.stop()
                self.live = None

    def notify(self, message: str) -> None:
        if self.is_drawing:  # a signal has come in the middle of a drawing
            self.pending_messages.append(message)
        else:
            super().notify(message)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        self.is_drawing = True
        try:
            yield
        finally:
            self.is_drawing = False
            while self.pending_messages:
                super().notify(self.pending_messages.pop(0))

    def _draw(self) -> None:
        from rich.console import Group
        from rich.live import Live

        if self.live is None:
            # Messages on standard error appear above the table, unless they go elsewhere.
            self.live = Live(console=self.console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
            self.live.start()
            self.console.show_cursor(True)  # a command that is killed could not show it again
        self.live.update(Group(self._rows(), self.progress), refresh=True)

    def _rows(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        rows = list(self.table.rows())
        columns = [list(column) for column in zip(*(["", *values, state] for _, values, state in rows), strict=True)][1:]
        headings = [*self.table.headings, ""]
        used = sum(2 + max(map(len, [heading, *column])) for heading, column in zip(headings, columns, strict=True))
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        grid.add_column("  attention", no_wrap=True)
        for heading in self.table.headings:
            grid.add_column(heading, justify="right", no_wrap=True)
        grid.add_column("", no_wrap=True)
        for name, values, state in rows:
            # A narrow terminal shortens names, never values.
            name = shorten(name, max(self.console.width - 2 - used, 8))
            grid.add_row(Text(f"  {name}"), *map(Text, values), Text(state, "dim"))
        note = self.table.footnote()
        return Group(grid, Text(f"  {note}", "dim")) if note else grid
