"""The entry point of a validation worker: `python -m runtime.validation.process PARENT REQUEST ANSWER`."""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

from runtime.processes.started import die_with_parent, exit_now

__all__ = ["main"]


def main(arguments: list[str]) -> NoReturn:
    """Run as a worker of `runtime.validation.worker`, watching the parent before anything heavy is imported.

    Args:
        arguments: the parent's process id, the request in JSON, and the descriptor of the file that rank 0 writes its
            answer to.
    """
    parent, request, answer = arguments
    die_with_parent(int(parent))
    try:
        from runtime.validation.worker import run_worker

        run_worker(request, int(answer))
    except BaseException:
        traceback.print_exc()
        exit_now(1)
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1:])
