"""How docstrings look on a page: they are written as prose, in which a line `name: …` tells of an argument."""

import re
from collections.abc import Iterable, Iterator

import griffe

ESCAPED = {"][": r"]\[", "<": "&lt;"}
IN_PROSE = re.compile(r"(?P<code>`[^`]*`|^    .*$)|\]\[|<", flags=re.MULTILINE)
"""x[i][j] is no link and results/<sweep> holds no tag; in code nothing is one."""


class Arguments(griffe.Extension):
    """Puts the arguments that a docstring tells of into a list, and `Returns` and `Raises` into paragraphs of their own."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is None:
            return
        text = IN_PROSE.sub(lambda found: found["code"] or ESCAPED[found[0]], obj.docstring.value)
        if isinstance(obj, griffe.Function | griffe.Class):
            text = listed(text, [parameter.name for parameter in obj.parameters])
        obj.docstring.value = text


def listed(docstring: str, names: Iterable[str]) -> str:
    """Markdown. Paragraphs without an argument, such as code, stay as they are."""
    any_name = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or r"(?!)"
    argument = re.compile(rf"(?:^|(?<=[.;] ))((?:{any_name})(?:, (?:{any_name}))*): ")
    docstring = re.sub(r"(?<=\.) (?=(?:Returns|Raises) )", "\n", docstring)
    return "\n\n".join(_paragraph(text, argument) for text in docstring.split("\n\n"))


def _paragraph(text: str, argument: re.Pattern[str]) -> str:
    statements = list(_statements(text.splitlines(), argument))
    if len(statements) == 1 and not argument.match(text):
        return text
    pieces = []
    for statement in statements:
        before, *found = argument.split(statement)
        pieces += [before.strip()] if before.strip() else []
        pieces += [f"- **`{names}`**: {told.strip().rstrip(';')}" for names, told in zip(found[::2], found[1::2], strict=True)]
    # Items of one list lie close; a paragraph behind a list needs the blank line.
    return "\n\n".join(pieces)


def _statements(lines: list[str], argument: re.Pattern[str]) -> Iterator[str]:
    """Lines joined, cut in front of an argument, of Returns and Raises, and, once there were arguments, after a full stop."""
    statement, told = "", False
    for line in lines:
        starts = argument.match(line) or line.startswith(("Returns ", "Raises ")) or (told and statement.endswith("."))
        if starts and statement:
            yield statement
            statement = ""
        told = told or argument.match(line) is not None
        statement = f"{statement} {line}" if statement else line
    yield statement
