"""The entry point of a child that proves classes: `python -m runtime.proving.process PARENT CONNECTION`.

It imports the code of the tree that it is given, watches its parent, and speaks JSON with it over an inherited pipe.
"""

from __future__ import annotations

import json
import resource
import sys
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from runtime.processes.started import die_with_parent, exit_now

__all__ = ["main"]

_RANKS_SHARE = 0.8
"""The share of a mode's time after which its ranks end themselves, saying what they wait for."""


def main(arguments: list[str]) -> NoReturn:
    """Answer the parent's tasks until it closes the pipe.

    Args:
        arguments: the parent's process id, and the descriptor of the pipe. The first message says what all tasks have
            in common: the folder to import from, the sizes, and the limits of memory and time.
    """
    parent, descriptor = map(int, arguments)
    die_with_parent(parent)
    pipe = Connection(descriptor)
    start = _receive(pipe)
    if start is None:
        exit_now(1)
    if start["memory"]:
        resource.setrlimit(resource.RLIMIT_DATA, (start["memory"], resource.RLIM_INFINITY))
    if start["root"]:
        # Before transformers is imported, and behind migrator's own packages, which are imported by their own paths.
        sys.path.insert(0, start["root"])
    try:
        _send(pipe, {"ready": _import_runtime()})
    except BaseException as error:
        _send(pipe, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        exit_now(1)
    _answer_tasks(pipe, start)
    exit_now(0)


def _import_runtime() -> str:
    """Import what every task needs, and return the version of transformers."""
    import torch
    import transformers

    import runtime.proving.prove  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    version: str = transformers.__version__
    return version


def _answer_tasks(pipe: Connection, start: dict[str, Any]) -> None:
    from runtime.proving.prove import ClassProof
    from runtime.proving.sizes import Sizes
    from runtime.proving.task import ProofTask

    sizes = Sizes(**start["sizes"])
    while (message := _receive(pipe)) is not None:
        task = ProofTask.from_json(message)
        proof = ClassProof(task, sizes, _RANKS_SHARE * start["timeout"])
        _send(pipe, {"built": True})
        for mode in task.modes:
            _send(pipe, proof.prove(mode).to_json())


def _receive(pipe: Connection) -> dict[str, Any] | None:
    try:
        message: dict[str, Any] = json.loads(pipe.recv_bytes())
    except EOFError:
        return None
    return message


def _send(pipe: Connection, value: dict[str, Any]) -> None:
    pipe.send_bytes(json.dumps(value).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
