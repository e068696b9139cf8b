"""The command line called in this process, as a user calls it, so that a test can say what is on the other end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from migrator.cli import main

__all__ = ["Result", "Run", "make_runner"]


@dataclass(frozen=True)
class Result:
    """What a command printed."""

    stdout: str
    stderr: str


Run = Callable[..., Result]


def make_runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret: str | None = None) -> Run:
    """Return a function that runs `migrator` with arguments and asserts its exit code, by default 0.

    Args:
        monkeypatch, capsys: the test's fixtures.
        secret: what must never be printed.
    """

    def run(*arguments: str, code: int = 0) -> Result:
        monkeypatch.setattr(sys, "argv", ["migrator", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert stop.value.code == code, captured
        assert secret is None or secret not in captured.out + captured.err
        return Result(captured.out, captured.err)

    return run
