"""The styles that can run, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from plans.errors import UnknownStyleError
from runtime.styles.dense import DENSE_STYLES
from runtime.styles.experts import EXPERT_STYLES
from runtime.styles.routing import ROUTING_STYLES
from runtime.styles.sequence import SEQUENCE_STYLES
from runtime.styles.style import ParallelStyle

__all__ = ["STYLES", "StyleRegistry"]


@dataclass(frozen=True)
class StyleRegistry:
    """Styles by name; a value, so that what one caller adds no other caller meets."""

    styles: Mapping[str, ParallelStyle]

    def register(self, style: ParallelStyle) -> StyleRegistry:
        """Return a registry that also has this style, in place of another one of its name."""
        return StyleRegistry(MappingProxyType({**self.styles, style.name: style}))

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


STYLES = StyleRegistry(
    MappingProxyType(
        {style.name: style for style in (*DENSE_STYLES, *EXPERT_STYLES, *ROUTING_STYLES, *SEQUENCE_STYLES)}
    )
)
