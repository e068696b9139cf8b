"""Checkpoints from and to a hub: the real client against a local server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from plans.errors import UsageError
from runtime.hub import HubName, parse_hub_name
from tests.hub_server import TOKEN, Hub, serving

ASK = """
import json, sys
from pathlib import Path
from plans.errors import MigratorError
from runtime.hub import fetch, parse_hub_name, resolve_folder, push
try:
    print(json.dumps(str(eval(sys.argv[1]))))
except MigratorError as error:
    print(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}))
"""

Ask = Callable[..., object]


@pytest.fixture
def hub(tiny_hub: Path) -> Iterator[Hub]:
    with serving() as hub:
        hub.add("owner/toy", tiny_hub)
        hub.files["owner/toy"] |= {"pytorch_model.bin": b"pickle", "original/consolidated.00.safetensors": b"other"}
        yield hub


@pytest.fixture
def tiny_hub(hub_folder: Callable[[str], Path]) -> Path:
    return hub_folder("qwen3_moe")


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """Return a function that evaluates an expression in a process whose hub is the local server."""

    def asked(expression: str, **environment: str) -> object:
        settings = {
            "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "",
        }  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-c", ASK, expression],
            env={**os.environ, **settings, **environment},
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        return json.loads(run.stdout.splitlines()[-1])

    return asked


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hf://owner/name", HubName("owner/name")),
        ("hf://owner/name@v1.0", HubName("owner/name", "v1.0")),
        ("hf://owner/name@refs/pr/3", HubName("owner/name", "refs/pr/3")),
        ("owner/name", HubName("owner/name")),
        ("owner/name@main", HubName("owner/name", "main")),
        ("tests/nothing", None),
        ("tests", None),
        ("./name", None),
        ("/owner/name", None),
    ],
)
def test_names(text: str, found: HubName | None) -> None:
    assert parse_hub_name(text) == found


@pytest.mark.parametrize("text", ["hf://", "hf://owner", "hf://owner/name/file", "hf://../x y"])
def test_what_no_hub_could_have_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a repository"):
        parse_hub_name(text)


def test_only_the_files_needed_are_fetched_and_only_once(hub: Hub, ask: Ask, tiny_hub: Path) -> None:
    folder = Path(str(ask("resolve_folder('hf://owner/toy')")))
    fetched = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert fetched == {path.name: path.read_bytes() for path in tiny_hub.iterdir()}
    assert sorted(hub.fetched) == sorted(fetched)
    assert ask("resolve_folder('owner/toy@main')") == str(folder)
    assert sorted(hub.fetched) == sorted(fetched)


def test_offline_the_cache_must_be_complete(hub: Hub, ask: Ask) -> None:
    refused = ask("fetch(parse_hub_name('owner/toy'))", HF_HUB_OFFLINE="1")
    assert isinstance(refused, dict)
    assert refused["error"] == "IncompleteError"
    assert "HF_HUB_OFFLINE" in refused["hint"]
    folder = ask("fetch(parse_hub_name('owner/toy'))")
    assert ask("fetch(parse_hub_name('owner/toy'))", HF_HUB_OFFLINE="1") == folder


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("owner/none", "CheckpointError", "no such repository"),
        ("owner/toy@none", "CheckpointError", "no such revision"),
    ],
)
def test_what_is_not_there_is_named(ask: Ask, name: str, error: str, message: str) -> None:
    refused = ask(f"fetch(parse_hub_name({name!r}))")
    assert isinstance(refused, dict)
    assert refused["error"] == error
    assert message in refused["message"]


def test_a_private_repository_needs_the_token(hub: Hub, ask: Ask) -> None:
    hub.private.add("owner/toy")
    refused = ask("fetch(parse_hub_name('owner/toy'))")
    assert isinstance(refused, dict)
    assert "hf auth login" in refused["hint"]
    assert isinstance(ask("fetch(parse_hub_name('owner/toy'))", HF_TOKEN=TOKEN), str)


def test_a_server_that_is_gone_is_named(ask: Ask) -> None:
    refused = ask("fetch(parse_hub_name('owner/toy'))", HF_ENDPOINT="http://127.0.0.1:9")
    assert isinstance(refused, dict)
    assert refused["error"] == "IncompleteError"


def test_a_folder_is_pushed_whole(hub: Hub, ask: Ask, tiny_hub: Path) -> None:
    address = ask(f"push(Path({str(tiny_hub)!r}), 'owner/new')", HF_TOKEN=TOKEN)
    assert address == f"{hub.address}/owner/new"
    assert hub.files["owner/new"] == {path.name: path.read_bytes() for path in tiny_hub.iterdir()}


def test_a_push_that_is_refused_says_how_to_go_on(hub: Hub, ask: Ask, tiny_hub: Path) -> None:
    for token, refuses in (("", False), (TOKEN, True)):
        hub.refuses_commits = refuses
        refused = ask(f"push(Path({str(tiny_hub)!r}), 'owner/new')", HF_TOKEN=token)
        assert isinstance(refused, dict)
        assert refused["error"] == "DestinationError"
        assert "hf upload owner/new" in refused["hint"]
