"""Writes docs/api.md from the docstrings of the public Python API, and docs/rules/ from the rules' own data.

    python docs/reference.py

tests/test_reference.py fails if the pages in the repository are not what this writes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from plans.rule import Rule, load_rules

DOCS = Path(__file__).parent

APIS = {
    "runtime": "Models made parallel, checkpoints loaded, and checks on both. Needs the extra `runtime`.",
    "migrator.jobs": "Declared migrations, `migrator run` as a library. Needs the extra `runtime`.",
    "codemods.commands": "The rewrite as a LibCST codemod. The base installation has it.",
}

_SECTION = re.compile(r"^(Args|Returns|Raises|Source|Yields):(.*)$")
_ENTRY = re.compile(r"^    (\S[^:]*): (.*)$")


def pages() -> dict[Path, str]:
    """Return the text of every page by its path."""
    rules = {DOCS / "rules" / f"{code}.md": rule_page(rule) for code, rule in load_rules().items()}
    return {DOCS / "api.md": api_page(), DOCS / "rules" / "README.md": rules_index(load_rules()), **rules}


def api_page() -> str:
    """Return the page of the Python API."""
    parts = ["# The Python API", "", "Made from the docstrings by `python docs/reference.py`.", ""]
    for name, purpose in APIS.items():
        module = importlib.import_module(name)
        parts += [f"## {name}", "", purpose, ""]
        for exported in module.__all__:
            parts += describe(exported, getattr(module, exported))
    return "\n".join(parts).rstrip() + "\n"


def describe(name: str, value: object) -> list[str]:
    """Return the lines of one exported name: its heading, and what its docstring says."""
    if inspect.isclass(value):
        lines = [f"### class `{name}`", "", *render(inspect.getdoc(value) or "")]
        for member, attribute in vars(value).items():
            if not member.startswith("_") and (attribute.__doc__ or "").strip():
                lines += describe_member(name, member, attribute)
        return lines
    if inspect.isfunction(value):
        return [f"### `{name}{parameters(value)}`", "", *render(inspect.getdoc(value) or "")]
    kind = type(value)
    home = "" if kind.__module__ == "builtins" else f"A `{kind.__name__}`."
    return [f"### `{name}`", "", *render(home or "A type."), ""]


def describe_member(owner: str, name: str, attribute: object) -> list[str]:
    """Return the lines of a documented method or property."""
    function = attribute
    if isinstance(attribute, property):
        function = attribute.fget
        heading = f"#### `{owner}.{name}`"
    elif isinstance(attribute, (classmethod, staticmethod)) or inspect.isfunction(attribute):
        function = getattr(attribute, "__func__", attribute)
        heading = f"#### `{owner}.{name}{parameters(function)}`"
    else:
        return []
    return [heading, "", *render(inspect.getdoc(function) or "")]


def parameters(function: object) -> str:
    """Return a function's parameters as they are written, without `self` or `cls`."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]  # type: ignore[arg-type]
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    returns = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def render(docstring: str) -> list[str]:
    """Return a docstring as Markdown: its sections as lists."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        if found := _SECTION.match(line):
            section = found[1]
            rest = found[2].strip()
            lines += [f"**{section}:** {rest}".rstrip(), ""] if section != "Source" else [f"*Source: {rest}*"]
        elif section in ("Args", "Raises") and (entry := _ENTRY.match(line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section in ("Args", "Raises") and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.strip() if section else line)
    return [*lines, ""]


def rule_page(rule: Rule) -> str:
    """Return the page of one rule."""
    rewrites = rule.before != rule.after
    parts = [
        f"# {rule.code} {rule.name}",
        "",
        f"Severity: {rule.severity}. {'Rewrites.' if rewrites else 'Reports.'}",
        "",
    ]
    parts += [rule.explanation.strip(), ""]
    if rewrites:
        parts += ["Before:", "", *_code(rule.before), "After:", "", *_code(rule.after)]
    else:
        parts += ["For example:", "", *_code(rule.before)]
    parts += [f"Message: `{rule.message}`", "", f"Next step: {rule.hint}"]
    return "\n".join(parts) + "\n"


def rules_index(rules: Mapping[str, Rule]) -> str:
    """Return the page that lists all rules."""
    rows = [f"| [{code}]({code}.md) | {rule.name} | {rule.severity} |" for code, rule in rules.items()]
    heading = [
        "# Rules",
        "",
        "Made from `plans/rules/` by `python docs/reference.py`; `migrator explain CODE` prints the same.",
        "",
    ]
    return "\n".join([*heading, "| code | name | severity |", "|---|---|---|", *rows]) + "\n"


def _code(text: str) -> Iterator[str]:
    yield from ("```python", text.strip("\n"), "```", "")


def main() -> None:
    """Write every page, and remove the pages of rules that no longer exist."""
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    stale = set((DOCS / "rules").glob("*.md")) - set(pages())
    for path in stale:
        path.unlink()


if __name__ == "__main__":
    main()
