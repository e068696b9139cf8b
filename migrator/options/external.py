"""How to read another stack's rank files: settings that are options of commands and settings of job files alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plans.errors import UsageError

if TYPE_CHECKING:
    from plans.mesh import Mode
    from runtime.checkpoint.external.source import ExternalSettings, SourceSettings

__all__ = [
    "ConfigName",
    "ExternalOptions",
    "check_external_options",
    "external_options",
    "is_address",
    "read_external_settings",
]


def is_address(text: str) -> bool:
    """Return whether a text is an address, on the hub or anywhere else, and not a local path."""
    return "://" in text


def _describe(kind: type | tuple[str, ...], help_text: str, metavar: str | None = None) -> dict[str, object]:
    """Return a setting's metadata: its type or its choices, and the help and metavar of its option."""
    return {"kind": kind, "help": help_text, "metavar": metavar}


class ConfigName(str):
    """A config.json or its folder, or the address of one, such as `hf://owner/name[@revision]`."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class ExternalOptions:
    """A user's description of another stack's rank files, which do not describe themselves; None for unset fields.

    Each field is an option of the command line (`from_tp` is `--from-tp`) and a setting of job files, and
    `ExternalSettings` has an argument of the same name.

    Args:
        from_pattern: the files' names, such as `model{rank}-mp{world}.safetensors`.
        from_tp: the number of tensor parallel ranks.
        from_ep: the number of ranks that share one set of experts.
        from_mode: which of the model's plans the files were sharded by.
        plan: a file with placements that differ from the model's plan.
        config: the checkpoint's config.json, its folder or an address of one; also without a pattern.
    """

    from_pattern: str | None = field(
        default=None,
        metadata=_describe(
            str,
            "Read SOURCE as another stack's rank files with these names, e.g. 'model{rank}-mp{world}.safetensors'.",
            "PATTERN",
        ),
    )
    from_tp: int | None = field(
        default=None, metadata=_describe(int, "Number of tensor parallel ranks that wrote these files.", "N")
    )
    from_ep: int | None = field(
        default=None, metadata=_describe(int, "Number of ranks that share one set of experts in these files.", "N")
    )
    from_mode: Mode | None = field(
        default=None,
        metadata=_describe(
            ("tp", "ep", "tp_ep"),
            "The plan by which these files were sharded; by default tp, or tp_ep if --from-ep is more than 1.",
        ),
    )
    plan: Path | None = field(
        default=None,
        metadata=_describe(
            Path, "JSON or TOML file, key to style or placement, for parameters sharded differently.", "FILE"
        ),
    )
    config: str | None = field(
        default=None,
        metadata=_describe(
            ConfigName, "The config.json of SOURCE, if it has none of its own; or hf://owner/name.", "FILE|hf://…"
        ),
    )


def read_external_settings(options: ExternalOptions, source: str) -> SourceSettings | None:
    """Return how to read a source's files, with the plan and config that the options name; None without options.

    Args:
        options: the user's settings.
        source: the checkpoint, as the user names it.

    Raises:
        UsageError: the options contradict each other or are incomplete, or the source is on the hub.
        CheckpointError: the plan or the config cannot be read.
    """
    check_external_options(options, source)
    if options.from_pattern is None and options.config is None:
        return None
    from runtime.checkpoint.external.plan import read_plan_file
    from runtime.checkpoint.external.source import SeparateConfig

    config = SeparateConfig.read(_find_config_folder(options.config)) if options.config else None
    if options.from_pattern is None:
        return config
    return _build_settings(options, plan=read_plan_file(options.plan) if options.plan else {}, config=config)


def check_external_options(options: ExternalOptions, source: str) -> None:
    """Refuse options that contradict each other, without reading a file.

    Args:
        options: the user's settings.
        source: the checkpoint, as the user names it.

    Raises:
        UsageError: the options contradict each other or are incomplete, or the source is on the hub.
    """
    if options.from_pattern is None:
        _check_nothing_set(options)
        return
    from runtime.hub import parse_hub_name
    from runtime.store import parse_store_name

    store = parse_store_name(source)
    if store is not None or parse_hub_name(source) is not None:
        step = f"`hf download {source} --local-dir …`" if store is None else f"`aws s3 cp --recursive {source} …`"
        raise UsageError(
            f"{source}: `from_pattern` reads a local folder", hint=f"download it first: {step}", source=source
        )
    if options.from_tp is None and options.from_ep is None:
        raise UsageError("`from_pattern` needs `from_tp`", hint="give the number of ranks that wrote the files")
    _build_settings(options)


def _build_settings(options: ExternalOptions, **contents: Any) -> ExternalSettings:  # noqa: ANN401
    from runtime.checkpoint.external.source import ExternalSettings, FilePattern

    assert options.from_pattern is not None
    ep = options.from_ep or 1
    tp = options.from_tp or (ep if options.from_mode == "ep" else 1)
    pattern = FilePattern(options.from_pattern)
    return ExternalSettings(pattern, from_tp=tp, from_ep=ep, from_mode=options.from_mode, **contents)


def _check_nothing_set(options: ExternalOptions) -> None:
    for setting in fields(ExternalOptions):
        if setting.name != "config" and getattr(options, setting.name) is not None:
            raise UsageError(
                f"`{setting.name}` describes another stack's rank files, but `from_pattern` does not name them",
                hint="give `from_pattern` the files' names, such as 'model{rank}-mp{world}.safetensors'",
            )


def _find_config_folder(config: str) -> Path:
    if is_address(config):
        from runtime.hub import resolve_config_folder

        if (folder := resolve_config_folder(config)) is not None:
            return folder
    path = Path(config)
    if path.is_dir():
        return path
    if path.name != "config.json":
        raise UsageError(f"`config={config}`: not a config.json", hint="name a config.json or its folder", path=config)
    return path.parent


_CLICK_TYPES: Mapping[type, click.ParamType[Any]] = {
    str: click.STRING,
    ConfigName: click.STRING,
    int: click.IntRange(min=1),
    Path: click.Path(path_type=Path),
}


def external_options(function: Callable[..., object]) -> Callable[..., object]:
    """Add an option for each field of `ExternalOptions` to a command, which receives them as `external`."""

    @functools.wraps(function)
    def command(**arguments: Any) -> object:  # noqa: ANN401
        external = ExternalOptions(**{setting.name: arguments.pop(setting.name) for setting in fields(ExternalOptions)})
        return function(**arguments, external=external)

    decorated: Callable[..., object] = command
    for setting in reversed(fields(ExternalOptions)):
        decorated = _make_click_option(setting)(decorated)
    return decorated


def _make_click_option(setting: Field[Any]) -> Callable[[Callable[..., object]], Callable[..., object]]:
    kind = setting.metadata["kind"]
    return click.option(
        f"--{setting.name.replace('_', '-')}",
        type=click.Choice(kind) if isinstance(kind, tuple) else _CLICK_TYPES[kind],
        metavar=setting.metadata["metavar"],
        help=setting.metadata["help"],
    )
