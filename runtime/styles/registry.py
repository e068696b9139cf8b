"""The styles that can run, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from plans.dialect import Dialect
from plans.errors import UnknownStyleError
from plans.style import Style
from runtime.styles.dense import DENSE_STYLES
from runtime.styles.experts import EXPERT_STYLES
from runtime.styles.routing import ROUTING_STYLES
from runtime.styles.sequence import SEQUENCE_STYLES
from runtime.styles.style import ParallelStyle

__all__ = ["STYLES", "StyleRegistry"]


@dataclass(frozen=True)
class StyleRegistry:
    """Styles by name; a value, so that what one caller adds no other caller meets.

    Args:
        styles: by name.
        registered: the names that were added to what the runtime brings.
    """

    styles: Mapping[str, ParallelStyle]
    registered: frozenset[str] = frozenset()

    def register(self, style: ParallelStyle) -> StyleRegistry:
        """Return a registry that also has this style, in place of another one of its name.

        Plans may name it then. Its `rules` say where parameters go; without any a known name keeps those it has.
        """
        return StyleRegistry(MappingProxyType({**self.styles, style.name: style}), self.registered | {style.name})

    def dialect(self, base: Dialect) -> Dialect:
        """Return a dialect that also has the registered styles that it does not know, or that bring rules."""
        added = {
            name: _to_dialect_style(self.styles[name])
            for name in self.registered
            if name not in base.styles or self.styles[name].rules
        }
        return replace(base, styles={**base.styles, **added})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all styles, sorted."""
        return tuple(sorted(self.styles))

    def style(self, name: str, key: str) -> ParallelStyle:
        """Return the style that a plan entry names.

        Raises:
            UnknownStyleError: no such style can run.
        """
        try:
            return self.styles[name]
        except KeyError:
            raise UnknownStyleError(
                f"{key!r}: the style {name!r} cannot run here",
                hint="styles that can: " + ", ".join(self.names),
                key=key,
                style=name,
            ) from None


def _to_dialect_style(style: ParallelStyle) -> Style:
    """Return what a plan entry of a registered style says, in the terms of dialects."""
    linear = {"features": "linear/in"}.get(style.takes, "linear/in split")
    return Style(
        style.name,
        job="both" if style.rules else "module",
        does="as registered",
        output="sharded" if style.gives == "features" else "whole",
        rules=style.rules,
        means={"linear": "linear/out" if style.gives == "features" else linear},
    )


STYLES = StyleRegistry(
    MappingProxyType(
        {style.name: style for style in (*DENSE_STYLES, *EXPERT_STYLES, *ROUTING_STYLES, *SEQUENCE_STYLES)}
    )
)
