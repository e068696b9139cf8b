"""The page of a report: one self-contained HTML file for any width, light or dark, usable by keyboard."""

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
"""The page loads nothing and runs nothing, even if a tensor's name contains markup."""


def render_report(report: Report) -> str:
    """Return a report as the text of an HTML file."""
    page = element("html", _head(report), element("body", *_body(report)), lang="en")
    return f"<!DOCTYPE html>\n{page.text}\n"


def write_report(report: Report, path: Path) -> None:
    """Write a report as an HTML file.

    Args:
        report: the content of the report.
        path: the file, which is replaced if it exists.

    Raises:
        DestinationError: the file cannot be written.
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
        # A file of this package, so there is nothing to escape.
        Html(f"<style>{css}</style>"),
    )


def _body(report: Report) -> list[Html]:
    sections = list(build_sections(report))
    links = (element("li", element("a", section.heading, href=f"#{section.anchor}")) for section in sections)
    return [
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", sanitize(report.title)), *_verdict(report), *_facts(report)),
        element("nav", element("ul", *links), aria_label="Sections"),
        element("main", *map(_section, sections), id="content", tabindex=-1),
    ]


def _section(section: Section) -> Html:
    return element("section", element("h2", section.heading), *section.body, id=section.anchor, tabindex=-1)


def _verdict(report: Report) -> list[Html]:
    verdict = [element("p", _VERDICTS[report.ok], class_="verdict")] if report.ok is not None else []
    return [*verdict, element("p", sanitize(report.summary), class_="summary")]


def _facts(report: Report) -> list[Html]:
    pairs = (
        element("div", element("dt", sanitize(name)), element("dd", sanitize(value)))
        for name, value in report.facts.items()
    )
    return [element("dl", *pairs)] if report.facts else []
