"""Fixtures that tests of commands share."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from migrator.cli import main


@pytest.fixture
def migrator(monkeypatch, capsys):
    """Run a command in this process, which has transformers imported already: (exit code, output, error lines)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["migrator", *map(str, arguments)])
        capsys.readouterr()  # what fixtures had to say
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def hub(tmp_path, hub_folder):
    """A checkpoint that the test may damage."""
    return Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub"))
