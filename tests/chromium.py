"""A small client for headless Chromium: its DevTools protocol, over a pipe, with nothing else installed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.waiting import HANG_TIMEOUT

__all__ = ["Page", "chromium", "find_chromium"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


def find_chromium() -> str | None:
    """Return where Chromium is, None where it is not installed."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """One tab, and everything that it said since it was opened.

    Args:
        reader: the pipe's end that Chromium writes to.
        writer: the pipe's end that it reads.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.said: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol and return its result; what is said meanwhile is kept in `said`."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + HANG_TIMEOUT
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.said.append(answer)

    def open(self, file: Path, width: int, height: int = 900, scheme: str = "light") -> None:
        """Show a file in a window of a size, and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.said.clear()
        self.call("Page.navigate", url=file.as_uri())
        deadline = time.monotonic() + HANG_TIMEOUT
        while not any(one.get("method") == "Page.loadEventFired" for one in self.said):
            self.said.append(self._next(deadline))

    def value(self, script: str) -> Any:
        """Return what an expression is in the page, as JSON carries it."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def screenshot(self, file: Path) -> None:
        """Write what the window shows as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    @property
    def complaints(self) -> list[str]:
        """What went wrong on the page: exceptions, entries of the log, anything that it wrote to the console."""
        wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(one["params"]) for one in self.said if one.get("method") in wrong]

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        sent = [one for one in self.said if one.get("method") == "Network.requestWillBeSent"]
        return [str(one["params"]["request"]["url"]) for one in sent]

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready = select.select([self._reader], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, "Chromium does not answer"
            piece = os.read(self._reader, 1 << 20)
            assert piece, "Chromium went away"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """Start Chromium with one tab, and end it with the block.

    Args:
        program: its path.
        profile: a folder of its own, which must be new.
    """
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # It speaks on descriptors 3 and 4, whatever ours are.
    command = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", program, *_FLAGS]
    command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_in, ours_out)
    finally:
        process.terminate()
        try:
            process.wait(HANG_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_in)
        os.close(ours_out)
