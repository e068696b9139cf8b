"""`migrator explain`: what a rule does and why, from the rules' own data."""

from __future__ import annotations

import difflib
from dataclasses import asdict

import click

from migrator.terminal import console
from plans.errors import UsageError
from plans.rule import Rule, load_rules

__all__ = ["command"]


@click.command("explain")
@click.argument("code", required=False)
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def command(code: str | None, form: str) -> None:
    """Explain the rule CODE, or list all rules.

    An explanation says what the rule does and why, and shows an example before and after.
    """
    chosen = [_find_rule(code)] if code else list(load_rules().values())
    if form == "json":
        rows = [asdict(rule) for rule in chosen]
        console.emit_json(rows[0] if code else rows)
    elif code:
        _show_rule(chosen[0])
    else:
        rows_of_text = [[rule.code, rule.name, rule.severity, _describe_action(rule)] for rule in chosen]
        console.print_table(
            "rules; `migrator explain CODE` says more", ["code", "name", "severity", "does"], rows_of_text
        )


def _find_rule(code: str) -> Rule:
    rules = load_rules()
    names = {name: rule for rule in rules.values() for name in (rule.code, rule.name)}
    wanted = code.upper() if code.upper() in names else code.lower()
    if wanted not in names:
        near = [
            *difflib.get_close_matches(code.upper(), rules, n=3),
            *difflib.get_close_matches(code.lower(), (rule.name for rule in rules.values()), n=2),
        ]
        raise UsageError(
            f"no rule is called {code!r}",
            hint=f"near it: {', '.join(near)}" if near else "`migrator explain` lists all rules",
            code=code,
            near=near,
        )
    return names[wanted]


def _show_rule(rule: Rule) -> None:
    console.emit(f"{rule.code} {rule.name}, {rule.severity}: {_describe_action(rule)}")
    console.emit(f"\n{rule.explanation.strip()}\n")
    for line in _format_example(rule):
        console.emit(line)
    console.emit(f"\nNext: {rule.hint}")


def _format_example(rule: Rule) -> list[str]:
    """Return the example as a diff, or as it is where the rule leaves it alone."""
    before, after = rule.before.strip().splitlines(), rule.after.strip().splitlines()
    if before == after:
        return [f"  {line}" for line in before]
    return [line for line in difflib.ndiff(before, after) if not line.startswith("?")]


def _describe_action(rule: Rule) -> str:
    if rule.before != rule.after:
        return "rewrites"
    return "leaves alone, with a note" if rule.severity == "note" else "reports"
