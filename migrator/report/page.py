"""The page of a report: one HTML file that needs nothing else, for any width, light or dark, and the keyboard."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from migrator.report.content import Report
from migrator.report.markup import Html, element
from migrator.report.sections import Section, build_sections
from migrator.terminal.text import sanitize
from plans.errors import DestinationError

__all__ = ["render_report", "write_report"]

_VERDICTS = {True: "✓ ok", False: "✗ not ok"}
_CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Nothing is fetched and nothing runs, whatever a tensor is called."""


def render_report(report: Report) -> str:
    """Return a report as the text of an HTML file."""
    parts = list(build_sections(report))
    page = element("html", _head(report), element("body", *_body(report, parts)), lang="en")
    return f"<!DOCTYPE html>\n{page.text}\n"


def write_report(report: Report, path: Path) -> None:
    """Write a report as an HTML file, which `--report` of a command names.

    Args:
        report: filled by a command.
        path: of the file, replaced where there is one.

    Raises:
        DestinationError: it cannot be written.
    """
    try:
        path.write_text(render_report(report), "utf-8")
    except OSError as error:
        raise DestinationError(
            f"{path}: {error.strerror or error}", hint="name a file in a folder that exists", path=str(path)
        ) from error


def _head(report: Report) -> Html:
    css = (files(__package__) / "report.css").read_text("utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_CONTENT_SECURITY_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", sanitize(report.title)),
        # Our own file, which has nothing to escape.
        Html(f"<style>{css}</style>"),
    )


def _body(report: Report, parts: list[Section]) -> list[Html]:
    links = (element("li", element("a", part.heading, href=f"#{part.anchor}")) for part in parts)
    drawn = (element("section", element("h2", part.heading), *part.body, id=part.anchor, tabindex=-1) for part in parts)
    return [
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", sanitize(report.title)), *_verdict(report), *_facts(report)),
        element("nav", element("ul", *links), aria_label="Sections"),
        element("main", *drawn, id="content", tabindex=-1),
    ]


def _verdict(report: Report) -> list[Html]:
    said = [element("p", sanitize(report.summary), class_="summary")]
    if report.ok is not None:
        said.insert(0, element("p", _VERDICTS[report.ok], class_="verdict"))
    return said


def _facts(report: Report) -> list[Html]:
    pairs = (
        element("div", element("dt", sanitize(name)), element("dd", sanitize(value)))
        for name, value in report.facts.items()
    )
    return [element("dl", *pairs)] if report.facts else []
