"""Translation of plans between dialects: from each style to its meaning for what the key names, and back to a style.

A name is kept only if it has the same meaning in both dialects. If the target dialect has no style with the same
meaning, the entry stays as it is and a finding says why; nothing is guessed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType

from plans.decompose import Decomposition, SetStyle
from plans.dialect import PARAM_LEVEL, Dialect, load_dialect
from plans.model_facts import KeyTarget, TargetReader
from plans.quantized import find_weight_key
from plans.rule import Finding, load_rule
from plans.style import Style

__all__ = ["Meaning", "load_meanings", "translate"]


_FILE = Path(__file__).with_name("meanings.toml")


@dataclass(frozen=True)
class Meaning:
    """What an entry does. Two styles have the same meaning only if all of these agree.

    Args:
        name: the name, such as `linear/out gathered`.
        on: what the key names.
        weight: the placement of the weight, or of the parameter itself; empty if nothing is sharded.
        bias: the placement of the bias.
        input: the input that each rank's forward expects.
        output: the output that each rank's forward returns.
        forward: what is communicated in the forward.
        backward: what is communicated in the backward.
        becomes: the meaning that replaces this one in dialects without a style for it.
        within: the meaning of an enclosing entry, without which `becomes` is not allowed.
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
_PARAMETER_OF_EXPERTS = {  # meaning of one expert's Linear: parameter of its stacked form, and its meaning
    "linear/out": ("gate_up_proj", "parameter/out packed"),
    "linear/out, gradient partial": ("gate_up_proj", "parameter/out packed"),
    "linear/in": ("down_proj", "parameter/in"),
    "linear/in, output partial": ("down_proj", "parameter/in"),
}


def translate(
    plan: Mapping[str, str], source: Dialect, target: Dialect, read_target: TargetReader, kind: str = "tp"
) -> Decomposition:
    """Return the edits that translate a plan from one dialect to another.

    Param-level styles are understood in every source dialect and valid in every target dialect, but only the target's
    own styles are written: a param-level entry stays if the target has no style with its meaning.

    Args:
        plan: key to style, in source order.
        source: the plan's dialect.
        target: the dialect to translate to.
        read_target: returns what a key names; called only if the answer matters.
        kind: the kind of plan, `tp`, `sp`, `ep`, `tp_ep` or `sp_ep`; some styles have a meaning in expert plans only.
    """
    param_level = load_dialect(PARAM_LEVEL).styles
    translation = _Translation(
        plan,
        source.name,
        {**param_level, **source.styles},
        target.name,
        {name: style for name, style in target.styles.items() if not style.only or style.only in kind.split("_")},
        {name: style for name, style in param_level.items() if name not in target.styles},
        cache(partial(_read_scaled_target, read_target)),
    )
    results = list(translation.hold_together(translation.translate_entries()))
    return Decomposition(
        tuple(result for result in results if isinstance(result, SetStyle)),
        tuple(result for result in results if isinstance(result, Finding)),
    )


def _read_scaled_target(read_target: TargetReader, key: str) -> KeyTarget | None:
    """Return what a key names; a quantizer's scale is a parameter with as many dims as its weight."""
    weight = find_weight_key(key)
    target = read_target(key)
    if target is None and weight is not None:
        scaled = read_target(weight)
        return scaled if scaled and scaled.kind == "parameter" else None
    return target


@dataclass(frozen=True)
class _Translation:
    """The translation of one plan.

    Args:
        plan: key to style.
        source_dialect: the name of the plan's dialect.
        source_styles: the styles that the plan may use.
        target_dialect: the name of the dialect to translate to.
        target_styles: the styles that may be written.
        param_level_styles: the param-level styles that may stay, although the target dialect does not have them.
        read_target: returns what a key names.
    """

    plan: Mapping[str, str]
    source_dialect: str
    source_styles: Mapping[str, Style]
    target_dialect: str
    target_styles: Mapping[str, Style]
    param_level_styles: Mapping[str, Style]
    read_target: TargetReader

    def translate_entries(self) -> Iterator[SetStyle | Finding]:
        """Yield an edit or a finding for every entry whose style does not mean the same in the target dialect."""
        for key, name in self.plan.items():
            style = self.source_styles.get(name)
            if style is None:
                yield self._report_unchanged(key, f"{self.source_dialect} has no such style")
            elif not self._is_shared(style):
                yield from self._translate_entry(key, style)

    def hold_together(self, results: Iterable[SetStyle | Finding]) -> Iterator[SetStyle | Finding]:
        """Yield results, but keep the styles of a weight and its scales where one of them cannot be translated."""
        results = list(results)
        failed = {result.key for result in results if isinstance(result, Finding)}
        for result in results:
            others = [key for key in self._find_cut_together(result.key) if key in failed]
            if isinstance(result, SetStyle) and others:
                yield self._report_unchanged(result.key, f"it must be sharded like {others[0]}, which stays")
            else:
                yield result

    def _find_cut_together(self, key: str) -> Iterator[str]:
        """Yield the other entries of the plan for the same weight, for its module, and for its scales."""
        weight = find_weight_key(key) or key
        owner = weight.removesuffix(".weight")
        for other in self.plan:
            of_weight = (find_weight_key(other) or other).removesuffix(".weight")
            if other != key and of_weight == owner:
                yield other

    def _is_shared(self, style: Style) -> bool:
        """Return whether a style means the same in both dialects, no matter what its key names."""
        namesake = self.target_styles.get(style.name)
        return namesake is not None and namesake.means == style.means

    def _translate_entry(self, key: str, style: Style) -> Iterator[SetStyle | Finding]:
        target = self.read_target(key)
        if target is None or (target.kind == "parameter" and target.ndim is None):
            yield self._report_unreadable(key)
            return
        target_kind = self._classify_target(key, target)
        meaning = style.meaning(target_kind)
        if meaning is None:
            yield self._report_unchanged(key, f"{self.source_dialect} does not define it for {target_kind}")
        elif self._is_summed_below(key, meaning):
            yield self._report_unchanged(
                key, f"in {self.target_dialect} its submodules sum their own outputs: remove it once all of them do"
            )
        elif (name := self._choose_style(key, target_kind, meaning)) is None:
            yield self._report_unchanged(
                key, f"{self.target_dialect} has no style for {target_kind} that means {meaning!r}"
            )
        elif name != style.name:
            yield SetStyle("MIG400", key, style.name, name)

    def _classify_target(self, key: str, target: KeyTarget) -> str:
        """Return the kind of target, as the styles' `means` tables name it."""
        if target.kind == "parameter":
            return "parameter, a bias" if key.endswith(".bias") else f"parameter {target.ndim}"
        if target.kind != "experts":
            return target.kind
        below = [self.source_styles.get(self.plan[other]) for other in self._find_keys_below(key)]
        if any(style is not None and style.meaning(_STACKED) == _WHOLE_EXPERTS for style in below):
            return "expert-parallel"
        return "experts" if below else "unsharded experts"

    def _read_meaning(self, key: str) -> str | None:
        target, style = self.read_target(key), self.source_styles.get(self.plan[key])
        return style.meaning(self._classify_target(key, target)) if target and style else None

    def _choose_style(self, key: str, target: str, meaning: str) -> str | None:
        """Return the style to write for a meaning, or for the one that it becomes; None if there is no such style."""
        current, names = self.plan[key], self._find_styles(target, meaning)
        if current in names and not self.target_styles[current].alias_of:
            return current
        if names:
            return names[0]
        if current in self.param_level_styles and self.param_level_styles[current].meaning(target) == meaning:
            return current
        facts = load_meanings()[meaning]
        if not facts.becomes or (facts.within and not self._is_within(key, facts.within)):
            return None
        return self._choose_style(key, target, facts.becomes)

    def _find_styles(self, target: str, meaning: str) -> list[str]:
        """Return the styles that may be written for a meaning, the preferred one first."""
        if target == "expert-parallel" and not self._find_styles(_STACKED, _WHOLE_EXPERTS):
            return []
        return [name for name, style in self.target_styles.items() if style.meaning(target) == meaning]

    def _is_within(self, key: str, meaning: str) -> bool:
        return any(key.startswith(f"{other}.") and self._read_meaning(other) == meaning for other in self.plan)

    def _is_summed_below(self, key: str, meaning: str) -> bool:
        """Return whether entries below an entry sum in the target dialect what the entry sums in the source dialect."""
        missing = {
            name
            for name, facts in load_meanings().items()
            if facts.within == meaning and not self._find_styles(facts.on, name)
        }
        return bool(missing) and any(self._read_meaning(other) in missing for other in self._find_keys_below(key))

    def _find_keys_below(self, key: str) -> Iterator[str]:
        return (other for other in self.plan if other.startswith(f"{key}."))

    def _report_unreadable(self, key: str) -> Finding:
        """Return why an entry cannot be read, and what replaces it if the model now stacks its experts."""
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
