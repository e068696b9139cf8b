"""The options that say how to read other people's rank files, which say nothing of themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from plans.errors import UsageError

if TYPE_CHECKING:
    from plans.mesh import Mode
    from runtime.checkpoint.external.source import ExternalSettings

__all__ = ["ExternalOptions", "external_options"]

_SIZE = click.IntRange(min=1)
_OPTIONS = (
    click.option(
        "--from-pattern",
        metavar="PATTERN",
        help="Read SOURCE as another stack's rank files of these names, such as 'model{rank}-mp{world}.safetensors'.",
    ),
    click.option("--from-tp", type=_SIZE, metavar="N", help="Tensor parallel ranks of these files."),
    click.option("--from-ep", type=_SIZE, metavar="N", help="Ranks of these files that share one set of experts."),
    click.option(
        "--from-mode",
        type=click.Choice(["tp", "ep", "tp_ep"]),
        help="Which of the model's plans cut them; by default tp, or tp_ep where --from-ep is more than 1.",
    ),
    click.option(
        "--plan",
        "plan_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Where they were cut otherwise: key to style or placement, JSON or TOML.",
    ),
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The config.json of these files, where it does not lie beside them.",
    ),
)


@dataclass(frozen=True)
class ExternalOptions:
    """What was said of foreign rank files; each None where it was not said."""

    from_pattern: str | None
    from_tp: int | None
    from_ep: int | None
    from_mode: Mode | None
    plan_file: Path | None
    config: Path | None

    def read(self, source: str) -> ExternalSettings | None:
        """Return how to read a source's files, None where they are to be read as any layout.

        Args:
            source: as named on the command line.

        Raises:
            UsageError: the options contradict one another, lack what belongs to them, or the source is on the hub.
            CheckpointError: the plan or the config cannot be read.
        """
        said = self.parse(source)
        if said is None:
            return None
        from runtime.checkpoint.external.plan_file import read_plan_file
        from runtime.checkpoint.external.source import SeparateConfig

        plan = read_plan_file(self.plan_file) if self.plan_file else {}
        folder = self._config_folder()
        return replace(said, plan=plan, config=None if folder is None else SeparateConfig.read(folder))

    def parse(self, source: str) -> ExternalSettings | None:
        """Return what is said, without reading a file.

        Args:
            source: as named on the command line.

        Raises:
            UsageError: the options contradict one another, lack what belongs to them, or the source is on the hub.
        """
        if self.from_pattern is None:
            self._require_pattern()
            return None
        from runtime.checkpoint.external.pattern import FilePattern
        from runtime.checkpoint.external.source import ExternalSettings
        from runtime.hub import parse_hub_name

        if parse_hub_name(source) is not None:
            raise UsageError(
                f"{source}: --from-pattern reads a local folder",
                hint=f"fetch it first, `hf download {source} --local-dir …`",
                source=source,
            )
        if self.from_tp is None and self.from_ep is None:
            raise UsageError("--from-pattern needs --from-tp", hint="say of how many ranks the files are")
        return ExternalSettings(FilePattern(self.from_pattern), *self._sizes(), self.from_mode)

    def _sizes(self) -> tuple[int, int]:
        ep = self.from_ep or 1
        return self.from_tp or (ep if self.from_mode == "ep" else 1), ep

    def _config_folder(self) -> Path | None:
        if self.config is None or self.config.is_dir():
            return self.config
        if self.config.name != "config.json":
            raise UsageError(
                f"--config {self.config}: not a config.json",
                hint="name a config.json, or its folder",
                path=str(self.config),
            )
        return self.config.parent

    def _require_pattern(self) -> None:
        said = {
            "--from-tp": self.from_tp,
            "--from-ep": self.from_ep,
            "--from-mode": self.from_mode,
            "--plan": self.plan_file,
            "--config": self.config,
        }
        for option, value in said.items():
            if value is not None:
                raise UsageError(
                    f"{option} speaks of another stack's rank files, but --from-pattern does not name them",
                    hint="give --from-pattern 'model{rank}-mp{world}.safetensors', or as they are named",
                )


def external_options(function: Callable[..., object]) -> Callable[..., object]:
    """Add `--from-pattern` and what belongs to it to a command, which gets them as `foreign`."""

    @functools.wraps(function)
    def command(
        from_pattern: str | None,
        from_tp: int | None,
        from_ep: int | None,
        from_mode: Mode | None,
        plan_file: Path | None,
        config: Path | None,
        **others: object,
    ) -> object:
        said = ExternalOptions(from_pattern, from_tp, from_ep, from_mode, plan_file, config)
        return function(**others, foreign=said)

    decorated: Callable[..., object] = command
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
