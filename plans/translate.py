"""Plans from one dialect to another: from each entry's style to its meaning on the thing its key names, and back.

The same name is kept only where it means the same. Where the target has no style of an equal meaning the entry stays as
it is and a finding says why; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from plans.decompose import Decomposition, SetStyle
from plans.described import Described, Describer
from plans.dialect import PARAM_LEVEL, Dialect, load_dialect
from plans.meaning import all_meanings
from plans.rule import Finding, rule
from plans.style import Style

__all__ = ["translate"]

_WHOLE_EXPERTS = "parameter/whole experts"
_STACKED = "parameter 3"
_ONE_EXPERT = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?:\*|\d+)\.\w+")
_PARAMETER_OF_EXPERTS = {  # what one expert's Linear means, and what its stacked form would
    "linear/out": ("gate_up_proj", "parameter/out packed"),
    "linear/out, gradient partial": ("gate_up_proj", "parameter/out packed"),
    "linear/in": ("down_proj", "parameter/in"),
    "linear/in, output partial": ("down_proj", "parameter/in"),
}


def translate(
    plan: Mapping[str, str], source: Dialect, target: Dialect, describe: Describer, kind: str = "tp"
) -> Decomposition:
    """Work out a plan of one dialect in the words of another.

    Param-level names are understood in every source and valid in every target, but only the target's own are written:
    a param-level entry stays where the target has no name for its meaning.

    Args:
        plan: key to style, in source order.
        source: the dialect that the plan speaks.
        target: the dialect wanted.
        describe: says what a key names; asked only where the answer matters.
        kind: of the plan, `tp`, `sp`, `ep`, `tp_ep` or `sp_ep`: some styles mean something in expert plans only.
    """
    overlay = load_dialect(PARAM_LEVEL).styles
    understood = {**overlay, **source.styles}
    everywhere = {name: style for name, style in overlay.items() if name not in target.styles}
    wanted = {name: style for name, style in target.styles.items() if not style.only or style.only in kind.split("_")}
    translation = _Translation(plan, source.name, understood, target.name, wanted, everywhere, cache(describe))
    results = list(translation.results())
    return Decomposition(
        tuple(result for result in results if isinstance(result, SetStyle)),
        tuple(result for result in results if isinstance(result, Finding)),
    )


@dataclass(frozen=True)
class _Translation:
    """One plan on its way.

    Args:
        plan: key to style.
        source: the name of the dialect that it speaks.
        understood: that dialect's styles.
        target: the name of the dialect wanted.
        wanted: the styles that may be written.
        everywhere: the param-level styles that may stay besides.
        describe: says what a key names.
    """

    plan: Mapping[str, str]
    source: str
    understood: Mapping[str, Style]
    target: str
    wanted: Mapping[str, Style]
    everywhere: Mapping[str, Style]
    describe: Describer

    def results(self) -> Iterator[SetStyle | Finding]:
        """Yield an edit or a finding for every entry that cannot stay as it is."""
        for key, name in self.plan.items():
            style = self.understood.get(name)
            if style is None:
                yield self._stays(key, f"{self.source} has no such style")
            elif not self._is_shared(style):
                yield from self._entry(key, style)

    def _is_shared(self, style: Style) -> bool:
        """Say whether a style means the same in both dialects, whatever its key names."""
        twin = self.wanted.get(style.name)
        return twin is not None and twin.means == style.means

    def _entry(self, key: str, style: Style) -> Iterator[SetStyle | Finding]:
        described = self.describe(key)
        if described is None or (described.named == "parameter" and described.rank is None):
            yield self._unreadable(key)
            return
        thing = self._thing(key, described)
        meaning = style.meaning(thing)
        if meaning is None:
            yield self._stays(key, f"{self.source} does not say what it means on {thing}")
        elif self._is_relieved(key, meaning):
            yield self._stays(key, f"in {self.target} parts below sum their own outputs: remove it once all do")
        elif (name := self._name(key, thing, meaning)) is None:
            yield self._stays(key, f"{self.target} has nothing for {meaning!r} on {thing}")
        elif name != style.name:
            yield SetStyle("MIG400", key, style.name, name)

    def _thing(self, key: str, described: Described) -> str:
        """Return the word for a thing that styles list their meanings under."""
        if described.named == "parameter":
            return "parameter, a bias" if key.endswith(".bias") else f"parameter {described.rank}"
        if described.named != "experts":
            return described.named
        below = [self.understood.get(self.plan[other]) for other in self._below(key)]
        if any(style is not None and style.meaning(_STACKED) == _WHOLE_EXPERTS for style in below):
            return "expert-parallel"
        return "experts" if below else "unsharded experts"

    def _meaning(self, key: str) -> str | None:
        described, style = self.describe(key), self.understood.get(self.plan[key])
        return style.meaning(self._thing(key, described)) if described and style else None

    def _name(self, key: str, thing: str, meaning: str) -> str | None:
        """Return the name for a meaning, or for the one that stands in for it."""
        own, names = self.plan[key], self._names(thing, meaning)
        if own in names and not self.wanted[own].alias_of:
            return own
        if names:
            return names[0]
        if own in self.everywhere and self.everywhere[own].meaning(thing) == meaning:
            return own
        known = all_meanings()[meaning]
        if not known.becomes or (known.within and not self._is_within(key, known.within)):
            return None
        return self._name(key, thing, known.becomes)

    def _names(self, thing: str, meaning: str) -> list[str]:
        """Return the styles that may be written for a meaning, best first."""
        if thing == "expert-parallel" and not self._names(_STACKED, _WHOLE_EXPERTS):
            return []
        return [name for name, style in self.wanted.items() if style.meaning(thing) == meaning]

    def _is_within(self, key: str, meaning: str) -> bool:
        return any(key.startswith(f"{other}.") and self._meaning(other) == meaning for other in self.plan)

    def _is_relieved(self, key: str, meaning: str) -> bool:
        """Say whether entries below one sum for themselves in the target what it sums in the source."""
        lost = {
            name
            for name, known in all_meanings().items()
            if known.within == meaning and not self._names(known.on, name)
        }
        return bool(lost) and any(self._meaning(other) in lost for other in self._below(key))

    def _below(self, key: str) -> Iterator[str]:
        return (other for other in self.plan if other.startswith(f"{key}."))

    def _unreadable(self, key: str) -> Finding:
        """Say why an entry cannot be read, and what takes its place if the model now stacks its experts."""
        match = _ONE_EXPERT.fullmatch(key)
        experts = self.describe(match["experts"]) if match else None
        meaning = self.understood[self.plan[key]].meaning("linear")
        if match is None or experts is None or experts.named != "experts" or meaning not in _PARAMETER_OF_EXPERTS:
            return _finding("MIG402", key, self.plan[key])
        parameter, stacked = _PARAMETER_OF_EXPERTS[meaning]
        name = next(iter(self._names(_STACKED, stacked)), "")
        to = f"{match['experts']}.{parameter}" + (f": {name}" if name else "")
        return _finding("MIG403", key, self.plan[key], where=experts.where, to=to)

    def _stays(self, key: str, where: str) -> Finding:
        return _finding("MIG401", key, self.plan[key], where=where)


def _finding(code: str, key: str, style: str, where: str = "", to: str = "") -> Finding:
    return Finding(code, key, rule(code).message.format(key=key, style=style, where=where, to=to))
