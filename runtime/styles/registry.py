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
    """Styles by name, immutable: a style that one caller registers is invisible to all others.

    Args:
        styles: the styles by name.
        registered: the names that were registered on top of the runtime's own.
    """

    styles: Mapping[str, ParallelStyle]
    registered: frozenset[str] = frozenset()

    def register(self, style: ParallelStyle) -> StyleRegistry:
        """Return a registry that also has this style, instead of another one of its name.

        Plans may then name the style. Its `rules` say where parameters go; without rules a known name keeps its own.
        """
        return StyleRegistry(MappingProxyType({**self.styles, style.name: style}), self.registered | {style.name})

    def dialect(self, base: Dialect) -> Dialect:
        """Return a dialect extended by the registered styles that it does not know or that bring rules."""
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
                hint="styles that can run: " + ", ".join(self.names),
                key=key,
                style=name,
            ) from None


def _to_dialect_style(style: ParallelStyle) -> Style:
    """Describe a registered style as a dialect does."""
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
