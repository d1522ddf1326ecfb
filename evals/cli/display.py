"""How a running comparison is shown: as a table that fills, on a terminal; in plain lines, in a log; or not at all.

A table is drawn again only between rounds. Nothing in this process works while turns are taken, so nothing here takes time from
what is measured. The terminal is in no special mode meanwhile, so that whatever ends the command leaves it whole.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from evals.cli.progress import Board
from evals.measure.clock import Stopwatch
from evals.results.formatting import shorten
from evals.results.ledger import Record

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


class Display(Protocol):
    """Shows one comparison after the other. Between `begin` and `end`, `watch` says what is done next and `add` what came of it."""

    begun: bool
    """Whether there is anything to do that was not done before."""

    def begin(self, place: str, conditions: str, board: Board) -> None:
        """place: which comparison it is, as in [2/7] seq_len=256."""

    def watch(self, words: str, part: float, left: str) -> None:
        """part: of all comparisons, from 0 to 1. left: about how long they take; empty if that is not known."""

    def add(self, record: Record) -> None: ...

    def end(self, left: str | None) -> None:
        """left: as of `watch`; None of a comparison that is broken off."""

    def say(self, words: str) -> None:
        """Tells of what happens meanwhile, on standard error. A signal handler may call it."""


def display(*, quiet: bool) -> Display:
    """The one for where standard output goes."""
    if quiet:
        return Quiet()
    return Table() if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else Lines()


class Quiet:
    """Says nothing: warnings, errors and the tables at the end come from elsewhere."""

    board: Board
    begun = False

    def begin(self, place: str, conditions: str, board: Board) -> None:
        self.board, self.begun = board, False

    def watch(self, words: str, part: float, left: str) -> None:
        self.begun = True

    def add(self, record: Record) -> None:
        self.board.add(record)

    def closing(self, left: str) -> list[str]:
        """The line behind a comparison, where there is anything to say."""
        told = [*([] if self.begun else ["was measured before"]), *filter(None, [self.board.note(), left])]
        return [f"  {'; '.join(told)}"] if told else []

    def end(self, left: str | None) -> None:
        pass

    def say(self, words: str) -> None:
        print(words, file=sys.stderr)


class Lines(Quiet):
    """A line when a comparison begins, one for what is worth it, and one at its end."""

    def begin(self, place: str, conditions: str, board: Board) -> None:
        super().begin(place, conditions, board)
        print(f"{place}: {conditions}", flush=True)

    def add(self, record: Record) -> None:
        line = self.board.add(record)
        if line is not None:
            print(line, flush=True)

    def end(self, left: str | None) -> None:
        for line in [] if left is None else self.closing(left):
            print(line, flush=True)


class Table(Quiet):
    """Every attention of the comparison with its figures so far, and below, what is being done and how much is left."""

    def __init__(self) -> None:
        from rich.console import Console  # of a terminal alone

        self.console: Console = Console(highlight=False)
        self.live: Live | None = None
        self.drawing = False
        self.unsaid: list[str] = []
        self.words, self.part, self.left = "", 0.0, ""

    def begin(self, place: str, conditions: str, board: Board) -> None:
        from rich.text import Text

        super().begin(place, conditions, board)
        self.place = place.partition(" ")[0]
        self.console.print(Text.assemble((place, "bold"), f": {conditions}"))

    def watch(self, words: str, part: float, left: str) -> None:
        super().watch(words, part, left)
        self.words, self.part, self.left = words, part, left
        with self._undisturbed():
            self._draw()

    def add(self, record: Record) -> None:
        line = self.board.add(record)
        with self._undisturbed():
            if line is not None and record["outcome"] != "ok":  # in the table is no room for why
                self.console.print(line, markup=False)
            if record["kind"] != "latency":  # those of a round come together, and `watch` behind them
                self._draw()

    def end(self, left: str | None) -> None:
        with self._undisturbed():
            if self.live is not None:
                self.live.update(self._rows())
                self.live.stop()
                self.live = None
                return
            for line in [] if left is None else self.closing(""):
                self.console.print(line, markup=False)

    def say(self, words: str) -> None:
        if self.drawing:  # the terminal takes no second word in the middle of one
            self.unsaid.append(words)
        else:
            super().say(words)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        self.drawing = True
        try:
            yield
        finally:
            self.drawing = False
            while self.unsaid:
                super().say(self.unsaid.pop())

    def _draw(self) -> None:
        from rich.console import Group
        from rich.live import Live

        if self.live is None:
            # What stands on standard error appears above the table, unless it goes elsewhere.
            self.live = Live(console=self.console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
            self.live.start()
            self.console.show_cursor(True)  # for who is killed cannot show it again
        self.live.update(Group(self._rows(), self._progress()), refresh=True)

    def _rows(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table as Grid
        from rich.text import Text

        rows = list(self.board.rows())
        columns = list(
            zip(*[["", *self.board.heads, ""], *([name, *figures, state] for name, figures, state in rows)], strict=True)
        )
        taken = sum(2 + max(map(len, column)) for column in columns[1:])
        grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        grid.add_column("  attention", no_wrap=True)
        for head in self.board.heads:
            grid.add_column(head, justify="right", no_wrap=True)
        grid.add_column("", no_wrap=True)
        for name, figures, state in rows:
            # Where it is narrow, figures stay whole.
            name = shorten(name, max(self.console.width - 2 - taken, 8))
            grid.add_row(Text(f"  {name}"), *map(Text, figures), Text(state, "dim"))
        note = self.board.note()
        return Group(grid, Text(f"  {note}", "dim")) if note else grid

    def _progress(self) -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.table import Table as Grid
        from rich.text import Text

        behind: list[RenderableType] = [ProgressBar(1.0, self.part, BAR), Text(f"{self.part:.0%}"), Text(self.left)]
        words = shorten(f"{self.place} {self.words}", max(self.console.width - BAR - len(f"  100% {self.left}"), 8))
        grid = Grid.grid(padding=(0, 1))
        grid.add_row(Text(words, no_wrap=True), *behind)
        return grid


BAR = 16
"""Columns that the bar of progress takes."""


class Outlook:
    """About how long a command still takes, by how long what it has done took. `jobs`: how many comparisons it has."""

    LEAST = 0.005
    """Of a comparison: from less, nothing can be told."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self.found = 0

    def left(self, done: float, jobs: int) -> str:
        """done: comparisons, `found` of which were done before."""
        own = done - self.found
        if own < self.LEAST or done >= jobs:
            return ""
        return f"about {span(self.watch.seconds() * (jobs - done) / own)} left"


def span(seconds: float) -> str:
    """In the unit in which one would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
