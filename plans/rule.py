"""Rules as data: the code of every finding, with its severity, message, explanation and example."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

__all__ = ["Finding", "Rule", "Severity", "load_rule", "load_rules"]

_FOLDER = Path(__file__).with_name("rules")

Severity = Literal["note", "warning", "error"]


@dataclass(frozen=True)
class Rule:
    """One rule: its messages, and what `migrator explain` prints about it.

    Args:
        code: the stable code, such as `MIG001`.
        name: a short name in words.
        severity: the severity of its findings; of a pending rewrite, `warning`.
        message: one line with the placeholders `{key}`, `{style}`, `{to}` and `{where}`.
        hint: the next step.
        explanation: a paragraph on what it means and why.
        before: an example plan as source text.
        after: the same plan after the rule was applied; equal to `before` for rules that only report.
        rewrites: the styles that the rule replaces, or none.
        to: the style that the rule writes.
    """

    code: str
    name: str
    severity: Severity
    message: str
    hint: str
    explanation: str
    before: str
    after: str
    rewrites: tuple[str, ...] = ()
    to: str = ""


@dataclass(frozen=True)
class Finding:
    """A finding about one plan entry.

    Args:
        code: the code of its rule.
        key: the plan key.
        message: the rule's message with its placeholders filled in.
    """

    code: str
    key: str
    message: str

    @property
    def severity(self) -> Severity:
        """The rule's severity."""
        return load_rule(self.code).severity

    @property
    def hint(self) -> str:
        """The rule's hint."""
        return load_rule(self.code).hint


@cache
def load_rules() -> Mapping[str, Rule]:
    """Return every rule by its code, sorted by code."""
    codes = sorted(path.stem for path in _FOLDER.glob("*.toml"))
    return MappingProxyType({code: load_rule(code) for code in codes})


@cache
def load_rule(code: str) -> Rule:
    """Return the rule with this code. Each has a file of its own, because a run needs only a few of them."""
    row = tomllib.loads((_FOLDER / f"{code}.toml").read_text("utf-8"))
    assert row["code"] == code
    return Rule(**{**row, "rewrites": tuple(row.get("rewrites", ()))})
