"""The grammar of claims: parses a sentence such as "bsbr 2x faster than standard at seq_len 4096"."""

import re
from dataclasses import dataclass
from typing import Literal, cast

from evals.errors import UsageError

GRAMMAR = (
    "<a> [<factor>x|<percent>%] faster|slower than <b>",
    "<a> uses [<factor>x|<percent>%] less|more memory than <b>",
    "<a> scales as n^<p> [in latency|memory]",
    "<a> overtakes <b> before|after seq_len <n>",
)
EXAMPLE = "bsbr 2x faster than standard at seq_len 4096"

NAME, NUMBER = r"""(?:"[^"]+"|'[^']+'|\S+)""", r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
SIZE = rf"(?:(?P<factor>{NUMBER})\s*[x×]\s+|(?P<percent>{NUMBER})\s*%\s+)?"
FORMS = tuple(
    re.compile(rf"(?P<first>{NAME})\s+(?:is\s+)?{form}(?:\s+at\s+(?P<settings>.+))?")
    for form in (
        rf"{SIZE}(?P<relation>faster|slower)\s+than\s+(?P<second>{NAME})",
        rf"uses\s+{SIZE}(?P<relation>less|more)\s+memory\s+than\s+(?P<second>{NAME})",
        rf"scales\s+as\s+n(?:\s*\^\s*(?P<power>{NUMBER}))?(?:\s+in\s+(?P<relation>latency|memory))?",
        rf"overtakes\s+(?P<second>{NAME})\s+(?P<relation>before|after)\s+seq_len\s+(?P<length>{NUMBER})",
    )
)
SETTING = re.compile(rf"(?P<key>[^\s=]+)(?:\s*=\s*|\s+)(?P<value>{NAME})")
Relation = Literal["faster", "slower", "less", "more", "latency", "memory", "before", "after"]
"""The comparison of latencies, that of memory, the quantity that scales, or the order of an overtaking and a length."""


@dataclass(frozen=True)
class Claim:
    """A claim about one attention, or about two."""

    first: str
    second: str  # the attention that `first` is compared with; empty for a claim about scaling
    relation: Relation
    amount: float  # the smallest ratio (1 if any will do), the exponent, or the length in tokens
    settings: dict[str, str]  # values of settings that it is restricted to, as written

    @property
    def names(self) -> set[str]:
        """The attentions that it names."""
        return {self.first, self.second} - {""}


def parse(text: str) -> Claim:
    """Parses a claim.

    Raises:
        UsageError: with the grammar and an example, if the text is not a claim.
    """
    match = next((match for form in FORMS if (match := form.fullmatch(text.strip()))), None)
    given = {key: _unquote(word) if word else word for key, word in match.groupdict().items()} if match else {}
    settings = (given.get("settings") or "").strip()
    pairs = [SETTING.fullmatch(pair) for pair in re.split(r"\s+and\s+", settings)] if settings else []
    if match is None or None in pairs:
        grammar = "; ".join(GRAMMAR)
        raise UsageError(
            f"{text!r} is no claim; one reads {grammar}; each may end in at <setting> <value> and …: {EXAMPLE!r}; "
            "a name with spaces stands in quotes"
        )
    if given["first"] == given.get("second"):
        raise UsageError(f"{given['first']} is compared with itself: name two attentions, as in {EXAMPLE!r}")
    relation = cast(Relation, given["relation"] or "latency")
    chosen = {pair["key"]: _unquote(pair["value"]) for pair in pairs if pair}
    return Claim(given["first"], given.get("second") or "", relation, _amount(given, relation), chosen)


def _unquote(word: str) -> str:
    return word[1:-1] if len(word) > 2 and word[0] == word[-1] and word[0] in "\"'" else word


def _amount(given: dict[str, str | None], relation: Relation) -> float:
    """The claimed ratio, exponent or length; a percentage becomes a ratio."""
    amount = float(next((given[key] for key in ("factor", "power", "length") if given.get(key)), None) or 1.0)
    if given.get("percent"):
        percent = float(str(given["percent"]))
        if relation == "less" and percent >= 100:
            raise UsageError(f"nothing uses {percent:g}% less memory: give less than 100%, or a factor such as 2x")
        amount = 1 / (1 - percent / 100) if relation == "less" else 1 + percent / 100
    if relation in ("faster", "slower", "less", "more") and amount < 1:
        raise UsageError(f"a factor must be at least 1, got {amount:g}x: say it the other way round, as in {EXAMPLE!r}")
    return amount
