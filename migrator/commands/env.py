"""`migrator env`: versions and platform, for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import click

from migrator import __version__
from migrator.options.common import format_option
from migrator.terminal import console

__all__ = ["command"]

_PACKAGES = ("torch", "transformers", "libcst", "safetensors", "huggingface_hub", "numpy", "click", "rich")


@click.command("env")
@format_option("human", "json")
def command(output_format: str) -> None:
    """Show versions and platform, for bug reports."""
    versions = {
        "migrator": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _find_version(package) for package in _PACKAGES},
    }
    if output_format == "json":
        console.emit_json(versions)
        return
    for name, text in versions.items():
        console.emit(f"{name:<15}  {text or 'not installed'}")


def _find_version(package: str) -> str | None:
    """Return a package's version from its metadata, without importing it; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
