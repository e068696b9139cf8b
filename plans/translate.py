"""Plans from one dialect to another: from each entry's style to its meaning on the thing its key names, and back.

The same name is kept only where it means the same. Where the target has no style of an equal meaning the entry stays as
it is and a finding says why; nothing is guessed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from plans.decompose import Decomposition, SetStyle
from plans.dialect import PARAM_LEVEL, Dialect, load_dialect
from plans.model_facts import KeyTarget, TargetReader
from plans.rule import Finding, load_rule
from plans.style import Style

__all__ = ["Meaning", "load_meanings", "translate"]


_FILE = Path(__file__).with_name("meanings.toml")


@dataclass(frozen=True)
class Meaning:
    """What an entry does; two styles have one meaning only if all of this agrees.

    Args:
        name: `linear/out gathered`.
        on: what the key names.
        weight: where the weight, or the parameter itself, goes; empty where nothing is sharded.
        bias: where the bias goes.
        input: what the forward expects on each rank.
        output: what it leaves on each rank.
        forward: what it communicates.
        backward: what it communicates on the way back.
        becomes: the meaning that stands in for this one where a dialect has no name for it.
        within: the meaning of an entry above, without which `becomes` does not hold.
    """

    name: str
    on: str
    weight: str = ""
    bias: str = ""
    input: str = ""
    output: str = ""
    forward: str = "nothing"
    backward: str = "nothing"
    becomes: str = ""
    within: str = ""


@cache
def load_meanings() -> Mapping[str, Meaning]:
    """Return every meaning by its name."""
    table = tomllib.loads(_FILE.read_text("utf-8"))
    return MappingProxyType({name: Meaning(name, **row) for name, row in table.items()})


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
    plan: Mapping[str, str], source: Dialect, target: Dialect, read_target: TargetReader, kind: str = "tp"
) -> Decomposition:
    """Work out a plan of one dialect in the words of another.

    Param-level names are understood in every source and valid in every target, but only the target's own are written:
    a param-level entry stays where the target has no name for its meaning.

    Args:
        plan: key to style, in source order.
        source: the dialect that the plan speaks.
        target: the dialect wanted.
        read_target: says what a key names; asked only where the answer matters.
        kind: of the plan, `tp`, `sp`, `ep`, `tp_ep` or `sp_ep`: some styles mean something in expert plans only.
    """
    overlay = load_dialect(PARAM_LEVEL).styles
    understood = {**overlay, **source.styles}
    everywhere = {name: style for name, style in overlay.items() if name not in target.styles}
    wanted = {name: style for name, style in target.styles.items() if not style.only or style.only in kind.split("_")}
    translation = _Translation(plan, source.name, understood, target.name, wanted, everywhere, cache(read_target))
    results = list(translation.translate_entries())
    return Decomposition(
        tuple(result for result in results if isinstance(result, SetStyle)),
        tuple(result for result in results if isinstance(result, Finding)),
    )


@dataclass(frozen=True)
class _Translation:
    """One plan on its way.

    Args:
        plan: key to style.
        source_dialect: the name of the dialect that it speaks.
        source_styles: that dialect's styles.
        target_dialect: the name of the dialect wanted.
        target_styles: the styles that may be written.
        param_level_styles: the param-level styles that may stay besides.
        read_target: says what a key names.
    """

    plan: Mapping[str, str]
    source_dialect: str
    source_styles: Mapping[str, Style]
    target_dialect: str
    target_styles: Mapping[str, Style]
    param_level_styles: Mapping[str, Style]
    read_target: TargetReader

    def translate_entries(self) -> Iterator[SetStyle | Finding]:
        """Yield an edit or a finding for every entry that cannot stay as it is."""
        for key, name in self.plan.items():
            style = self.source_styles.get(name)
            if style is None:
                yield self._report_unchanged(key, f"{self.source_dialect} has no such style")
            elif not self._is_shared(style):
                yield from self._translate_entry(key, style)

    def _is_shared(self, style: Style) -> bool:
        """Say whether a style means the same in both dialects, whatever its key names."""
        twin = self.target_styles.get(style.name)
        return twin is not None and twin.means == style.means

    def _translate_entry(self, key: str, style: Style) -> Iterator[SetStyle | Finding]:
        described = self.read_target(key)
        if described is None or (described.kind == "parameter" and described.ndim is None):
            yield self._report_unreadable(key)
            return
        thing = self._classify_target(key, described)
        meaning = style.meaning(thing)
        if meaning is None:
            yield self._report_unchanged(key, f"{self.source_dialect} does not say what it means on {thing}")
        elif self._is_summed_below(key, meaning):
            yield self._report_unchanged(
                key, f"in {self.target_dialect} parts below sum their own outputs: remove it once all do"
            )
        elif (name := self._choose_style(key, thing, meaning)) is None:
            yield self._report_unchanged(key, f"{self.target_dialect} has nothing for {meaning!r} on {thing}")
        elif name != style.name:
            yield SetStyle("MIG400", key, style.name, name)

    def _classify_target(self, key: str, target: KeyTarget) -> str:
        """Return the word for a thing that styles list their meanings under."""
        if target.kind == "parameter":
            return "parameter, a bias" if key.endswith(".bias") else f"parameter {target.ndim}"
        if target.kind != "experts":
            return target.kind
        below = [self.source_styles.get(self.plan[other]) for other in self._find_keys_below(key)]
        if any(style is not None and style.meaning(_STACKED) == _WHOLE_EXPERTS for style in below):
            return "expert-parallel"
        return "experts" if below else "unsharded experts"

    def _read_meaning(self, key: str) -> str | None:
        described, style = self.read_target(key), self.source_styles.get(self.plan[key])
        return style.meaning(self._classify_target(key, described)) if described and style else None

    def _choose_style(self, key: str, target: str, meaning: str) -> str | None:
        """Return the name for a meaning, or for the one that stands in for it."""
        own, names = self.plan[key], self._find_styles(target, meaning)
        if own in names and not self.target_styles[own].alias_of:
            return own
        if names:
            return names[0]
        if own in self.param_level_styles and self.param_level_styles[own].meaning(target) == meaning:
            return own
        known = load_meanings()[meaning]
        if not known.becomes or (known.within and not self._is_within(key, known.within)):
            return None
        return self._choose_style(key, target, known.becomes)

    def _find_styles(self, target: str, meaning: str) -> list[str]:
        """Return the styles that may be written for a meaning, best first."""
        if target == "expert-parallel" and not self._find_styles(_STACKED, _WHOLE_EXPERTS):
            return []
        return [name for name, style in self.target_styles.items() if style.meaning(target) == meaning]

    def _is_within(self, key: str, meaning: str) -> bool:
        return any(key.startswith(f"{other}.") and self._read_meaning(other) == meaning for other in self.plan)

    def _is_summed_below(self, key: str, meaning: str) -> bool:
        """Say whether entries below one sum for themselves in the target what it sums in the source."""
        lost = {
            name
            for name, known in load_meanings().items()
            if known.within == meaning and not self._find_styles(known.on, name)
        }
        return bool(lost) and any(self._read_meaning(other) in lost for other in self._find_keys_below(key))

    def _find_keys_below(self, key: str) -> Iterator[str]:
        return (other for other in self.plan if other.startswith(f"{key}."))

    def _report_unreadable(self, key: str) -> Finding:
        """Say why an entry cannot be read, and what takes its place if the model now stacks its experts."""
        match = _ONE_EXPERT.fullmatch(key)
        experts = self.read_target(match["experts"]) if match else None
        meaning = self.source_styles[self.plan[key]].meaning("linear")
        if match is None or experts is None or experts.kind != "experts" or meaning not in _PARAMETER_OF_EXPERTS:
            return _build_finding("MIG402", key, self.plan[key])
        parameter, stacked = _PARAMETER_OF_EXPERTS[meaning]
        name = next(iter(self._find_styles(_STACKED, stacked)), "")
        to = f"{match['experts']}.{parameter}" + (f": {name}" if name else "")
        return _build_finding("MIG403", key, self.plan[key], where=experts.where, to=to)

    def _report_unchanged(self, key: str, where: str) -> Finding:
        return _build_finding("MIG401", key, self.plan[key], where=where)


def _build_finding(code: str, key: str, style: str, where: str = "", to: str = "") -> Finding:
    return Finding(code, key, load_rule(code).message.format(key=key, style=style, where=where, to=to))
