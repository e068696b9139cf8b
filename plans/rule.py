"""Rules: every finding's code with its severity, what it means, why, and an example, as data."""

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
    """One rule, the source of what `migrator explain` prints and of every message.

    Args:
        code: `MIG001`, stable for ever.
        name: a short name in words.
        severity: of its findings; of a pending rewrite, `warning`.
        message: one line; `{key}`, `{style}`, `{to}` and `{where}` are filled in.
        hint: the next step.
        explanation: a paragraph.
        rewrites: style names this rule replaces, or none.
        to: the style it writes.
        before: an example plan as text.
        after: the same plan after the rule; equal to `before` where the rule only reports.
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
    """Something found about one plan entry.

    Args:
        code: the rule's.
        key: the plan key.
        message: the rule's message, filled in.
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
    """Return every rule by its code, in the order of the codes."""
    codes = sorted(path.stem for path in _FOLDER.glob("*.toml"))
    return MappingProxyType({code: load_rule(code) for code in codes})


@cache
def load_rule(code: str) -> Rule:
    """Return the rule with this code; each lies in a file of its own, and a run needs few."""
    row = tomllib.loads((_FOLDER / f"{code}.toml").read_text("utf-8"))
    assert row["code"] == code
    return Rule(**{**row, "rewrites": tuple(row.get("rewrites", ()))})
