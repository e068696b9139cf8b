"""`migrator explain`: what a rule does and why, from the data of the rules."""

from __future__ import annotations

import difflib
from dataclasses import asdict

import click

from migrator.options.common import format_option
from migrator.terminal import console
from plans.errors import UsageError
from plans.rule import Rule, load_rules

__all__ = ["command"]


@click.command("explain")
@click.argument("code", required=False)
@format_option("human", "json")
def command(code: str | None, output_format: str) -> None:
    """Explain the rule CODE, or list all rules.

    An explanation says what the rule does and why, and shows an example before and after.
    """
    rules = [_find_rule(code)] if code else list(load_rules().values())
    if output_format == "json":
        values = [asdict(rule) for rule in rules]
        console.emit_json(values[0] if code else values)
    elif code:
        _show_rule(rules[0])
    else:
        rows = [[rule.code, rule.name, rule.severity, _describe_action(rule)] for rule in rules]
        console.print_table("rules; `migrator explain CODE` says more", ["code", "name", "severity", "does"], rows)


def _find_rule(code: str) -> Rule:
    rules = load_rules()
    by_name = {name: rule for rule in rules.values() for name in (rule.code, rule.name)}
    name = code.upper() if code.upper() in by_name else code.lower()
    if name not in by_name:
        near = [
            *difflib.get_close_matches(code.upper(), rules, n=3),
            *difflib.get_close_matches(code.lower(), (rule.name for rule in rules.values()), n=2),
        ]
        raise UsageError(
            f"there is no rule {code!r}",
            hint=f"similar names: {', '.join(near)}" if near else "`migrator explain` lists all rules",
            code=code,
            near=near,
        )
    return by_name[name]


def _show_rule(rule: Rule) -> None:
    console.emit(f"{rule.code} {rule.name}, {rule.severity}: {_describe_action(rule)}")
    console.emit(f"\n{rule.explanation.strip()}\n")
    for line in _format_example(rule):
        console.emit(line)
    console.emit(f"\nNext: {rule.hint}")


def _format_example(rule: Rule) -> list[str]:
    """Return the example as a diff, or unchanged if the rule leaves it alone."""
    before, after = rule.before.strip().splitlines(), rule.after.strip().splitlines()
    if before == after:
        return [f"  {line}" for line in before]
    return [line for line in difflib.ndiff(before, after) if not line.startswith("?")]


def _describe_action(rule: Rule) -> str:
    if rule.before != rule.after:
        return "rewrites"
    return "leaves alone, with a note" if rule.severity == "note" else "reports"
