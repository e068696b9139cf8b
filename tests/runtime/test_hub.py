"""Checkpoints from and to a hub: the real client against a local server."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HUB_CACHE as CACHE
from huggingface_hub.errors import HfHubHTTPError

from plans.errors import CheckpointError, DestinationError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.hub import HubName, fetch, fetch_config, parse_hub_name, push
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


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's files by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def hub(tiny_hub: Path) -> Iterator[Hub]:
    with serving() as hub:
        hub.add("owner/toy", tiny_hub)
        hub.files["owner/toy"] |= {"pytorch_model.bin": b"pickle", "original/consolidated.00.safetensors": b"other"}
        yield hub


@pytest.fixture
def tiny_hub(hub_folder: Callable[[str], Path]) -> Path:
    return hub_folder("qwen3_moe")


def start(hub: Hub, folder: Path, expression: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process that evaluates an expression and whose hub is the local server."""
    settings = {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", ASK, expression],
        env={**os.environ, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """Return a function that evaluates an expression in a process whose hub is the local server."""

    def asked(expression: str, **environment: str) -> object:
        process = start(hub, tmp_path, expression, **environment)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        return json.loads(output.splitlines()[-1])

    return asked


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hf://owner/name", HubName("owner/name")),
        ("hf://owner/name@v1.0", HubName("owner/name", "v1.0")),
        ("hf://owner/name@refs/pr/3", HubName("owner/name", "refs/pr/3")),
        ("hf://models/owner/name", HubName("owner/name")),
        ("hf://owner/name/step-5/hub", HubName("owner/name", folder="step-5/hub")),
        ("hf://owner/name@v1.0/step-5/", HubName("owner/name", "v1.0", folder="step-5")),
        ("hf://owner/name@a%2Fb/step-5", HubName("owner/name", "a/b", folder="step-5")),
        ("hf://buckets/owner/name/runs/5", HubName("owner/name", kind="bucket", folder="runs/5")),
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
    if found is not None:
        assert parse_hub_name(str(found)) == found, "its own text means something else"


@pytest.mark.parametrize("text", ["hf://", "hf://owner", "hf://owner/name/../x", "hf://../x y"])
def test_what_no_hub_could_have_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a repository") as caught:
        parse_hub_name(text)
    assert caught.value.hint.startswith("write hf://owner/name, with @revision or /folder behind it if you like")


@pytest.mark.parametrize("kind", ["dataset", "space", "kernel"])
def test_repositories_of_other_things_are_refused(kind: str) -> None:
    with pytest.raises(UsageError, match=f"a {kind}, which holds no checkpoint"):
        parse_hub_name(f"hf://{kind}s/owner/name")


def test_only_the_files_needed_are_fetched_and_only_once(hub: Hub, ask: Ask, tiny_hub: Path) -> None:
    folder = Path(str(ask("resolve_folder('hf://owner/toy')")))
    fetched = files(folder)
    assert fetched == files(tiny_hub)
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
    ("name", "message", "hint"),
    [
        ("owner/none", "no such repository", "check the name, or run `hf auth login` if it is private"),
        ("owner/toy@none", "no such revision", "name a branch, tag or commit"),
    ],
)
def test_what_is_not_there_is_named(ask: Ask, name: str, message: str, hint: str) -> None:
    refused = ask(f"fetch(parse_hub_name({name!r}))")
    assert isinstance(refused, dict)
    assert (refused["error"], refused["hint"]) == ("CheckpointError", hint)
    assert message in refused["message"]


def test_a_private_repository_needs_the_token(hub: Hub, ask: Ask) -> None:
    hub.private.add("owner/toy")
    refused = ask("fetch(parse_hub_name('owner/toy'))")
    assert isinstance(refused, dict)
    assert "hf auth login" in refused["hint"]
    assert isinstance(ask("fetch(parse_hub_name('owner/toy'))", HF_TOKEN=TOKEN), str)


def test_a_gated_repository_needs_access(hub: Hub, ask: Ask) -> None:
    hub.gated.add("owner/toy")
    assert ask("fetch(parse_hub_name('owner/toy'))", HF_TOKEN=TOKEN) == {
        "error": "CheckpointError",
        "message": "hf://owner/toy: gated, and this account has no access yet",
        "hint": "request access on its page, then run `hf auth login`",
    }
    hub.gated.clear()
    assert isinstance(ask("fetch(parse_hub_name('owner/toy'))", HF_TOKEN=TOKEN), str)


def test_a_server_that_fails_is_asked_again(hub: Hub, ask: Ask, tiny_hub: Path) -> None:
    hub.failing.add("config.json")
    refused = ask("fetch(parse_hub_name('owner/toy'))")
    assert isinstance(refused, dict)
    assert (refused["error"], refused["hint"]) == ("CheckpointError", "check the network and try again")
    assert "500" in refused["message"]
    hub.failing.clear()
    assert files(Path(str(ask("fetch(parse_hub_name('owner/toy'))")))) == files(tiny_hub)


FULL, FORBIDDEN, BROKEN = (
    f"{step}; HF_HUB_CACHE names another folder for the files of the hub"
    for step in (
        "free some space or choose another disk",
        "choose a folder that you may write to",
        "check the path and that the disk is well",
    )
)


@pytest.mark.parametrize(("place", "variable"), [("cache", "HF_HOME"), ("cache/hub", "HF_HUB_CACHE")])
def test_a_cache_that_cannot_be_written_goes_elsewhere(
    place: str, variable: str, ask: Ask, tiny_hub: Path, tmp_path: Path
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()  # where there should be a folder
    refused = ask("fetch(parse_hub_name('owner/toy'))")
    assert isinstance(refused, dict)
    assert refused["error"] == "CheckpointError"
    assert refused["message"].startswith(f"hf://owner/toy: {tmp_path / place}")
    assert refused["hint"] == BROKEN.replace("HF_HUB_CACHE", variable)
    folder = Path(str(ask("fetch(parse_hub_name('owner/toy'))", **{variable: str(tmp_path / "elsewhere")})))
    assert folder.is_relative_to(tmp_path / "elsewhere")
    assert files(folder) == files(tiny_hub)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_cache_that_may_not_be_written_is_named(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hub").mkdir(mode=0o500)
    refused = ask("fetch(parse_hub_name('owner/toy'))")
    assert isinstance(refused, dict)
    assert "Permission denied" in refused["message"]
    assert refused["hint"] == FORBIDDEN


AGAIN = "check the network and try again"


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device", FULL),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded", FULL),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), f"{CACHE}/1"), f"{CACHE}/1: Read-only file", FORBIDDEN),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), f"{CACHE}/1"), f"{CACHE}/1: Permission", FORBIDDEN),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error", BROKEN),
        (OSError("file should be of size 3 but has size 2"), "file should be of size 3", AGAIN),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer", AGAIN),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "Connection timed out", AGAIN),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known", AGAIN),
        (ssl.SSLError(1, "[SSL] record layer failure"), "record layer failure", AGAIN),
        (HfHubHTTPError.__bases__[0]("Server disconnected"), "Server disconnected", AGAIN),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_fails_is_named_with_what_helps(
    error: Exception, said: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    for read in (fetch, fetch_config):
        with pytest.raises(CheckpointError) as caught:
            read(HubName("owner/toy"))
        assert said in caught.value.message
        assert caught.value.hint == hint


def test_a_folder_that_cannot_be_read_is_no_matter_of_the_account(
    tiny_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tiny_hub / "config.json"))

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    with pytest.raises(DestinationError, match=r"Permission denied: .*config\.json") as caught:
        push(tiny_hub, "owner/new")
    assert caught.value.hint == (
        "check that the disk is well and that you may read it, then run the same command again: "
        "it uploads only what is missing"
    )


def test_a_server_that_is_gone_is_named(ask: Ask) -> None:
    refused = ask("fetch(parse_hub_name('owner/toy'))", HF_ENDPOINT="http://127.0.0.1:9")
    assert isinstance(refused, dict)
    assert refused["error"] == "IncompleteError"
    assert refused["hint"] == "check the network, or unset HF_HUB_OFFLINE"
    assert isinstance(ask("fetch(parse_hub_name('owner/toy'))"), str)


def test_a_folder_is_pushed_whole(hub: Hub, ask: Ask, tiny_hub: Path) -> None:
    address = ask(f"push(Path({str(tiny_hub)!r}), 'owner/new')", HF_TOKEN=TOKEN)
    assert address == f"{hub.address}/owner/new"
    assert hub.files["owner/new"] == files(tiny_hub)


def test_a_push_that_is_refused_says_how_to_go_on(hub: Hub, ask: Ask, tiny_hub: Path) -> None:
    for token, refuses in (("", False), (TOKEN, True)):
        hub.refuses_commits = refuses
        refused = ask(f"push(Path({str(tiny_hub)!r}), 'owner/new')", HF_TOKEN=token)
        assert isinstance(refused, dict)
        assert refused["error"] == "DestinationError"
        assert refused["hint"] == (
            "log in with `hf auth login`, then run the same command again: it uploads only what is missing"
        )
    hub.refuses_commits = False
    ask(f"push(Path({str(tiny_hub)!r}), 'owner/new')", HF_TOKEN=TOKEN)
    assert hub.files["owner/new"] == files(tiny_hub)
    assert len(hub.uploaded) == len(set(hub.uploaded))


class Kills:
    """Kills a pushing process while it waits for the answer to its n-th request that changes anything."""

    def __init__(self, hub: Hub, folder: Path, result: Path, at: int) -> None:
        self.seen: list[str] = []
        self._at = at
        self._lock = threading.Lock()
        hub.interrupt = self
        self._process = start(hub, folder, push_of(result), HF_TOKEN=TOKEN)
        _, self.errors = self._process.communicate()
        self.happened = self._process.returncode == -signal.SIGKILL
        assert self.happened or self._process.returncode == 0, self.errors
        hub.interrupt = lambda request: None

    def __call__(self, request: str) -> None:
        with self._lock:  # Large files are uploaded by several threads.
            self.seen.append(request)
            if len(self.seen) == self._at:
                self._process.kill()
                self._process.wait()


def push_of(folder: Path) -> str:
    return f"push(Path({str(folder)!r}), 'owner/new')"


@pytest.mark.full
@pytest.mark.parametrize("before", ["nothing", "a checkpoint for more ranks"])
def test_a_push_killed_anywhere_leaves_the_old_files_or_all_new_ones(
    before: str, hub: Hub, tiny_hub: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    execute_reshard(plan_reshard(tiny_hub, Mesh(tp=4)), old)
    execute_reshard(plan_reshard(tiny_hub, Mesh(tp=2)), new)
    readme = {"README.md": b"# Mine\n", "adapter_model.safetensors": b"mine too"}
    at, ends = 0, list[str]()
    while True:
        at += 1
        hub.files["owner/new"] = files(old) | readme if before != "nothing" else dict(readme)
        hub.heads.clear(), hub.objects.clear(), hub.uploaded.clear(), hub.commits.clear()
        allowed = [dict(hub.files["owner/new"]), files(new) | readme]
        kills = Kills(hub, tmp_path, new, at)
        assert hub.files["owner/new"] in allowed, kills.seen
        if not kills.happened:
            break
        ends.append(kills.seen[at - 1].split("/")[-1])
        finishes = Kills(hub, tmp_path, new, at=0)
        assert not finishes.happened
        assert hub.files["owner/new"] == allowed[1]
        assert all(names == sorted(allowed[1]) for names in hub.commits), "a reader saw something between the two"
        assert sorted(set(hub.uploaded)) == sorted(hub.uploaded), "something was uploaded twice"
    assert {"create", "main", "batch"} <= set(ends)
    assert len(ends) >= 6, ends  # create, upload modes, batch, two rank files, commit


def test_a_push_replaces_an_older_checkpoint_and_nothing_else(
    hub: Hub, ask: Ask, tiny_hub: Path, tmp_path: Path
) -> None:
    for name, mesh in (("four", Mesh(tp=4)), ("two", Mesh(tp=2))):
        execute_reshard(plan_reshard(tiny_hub, mesh), tmp_path / name)
    mine = {"README.md": b"# Mine\n", ".gitignore": b"*.safetensors\n", "original/consolidated.00.pth": b"others'"}
    hub.files["owner/new"] = {**mine, "model.safetensors": b"old", "optimizer/__0_0.distcp": b"old"}
    for name in ("four", "two"):
        ask(push_of(tmp_path / name), HF_TOKEN=TOKEN)
        assert hub.files["owner/new"] == files(tmp_path / name) | mine
    ask(push_of(tmp_path / "two"), HF_TOKEN=TOKEN)
    assert hub.files["owner/new"] == files(tmp_path / "two") | mine


def test_a_push_beside_another_one_is_refused(hub: Hub, ask: Ask, tiny_hub: Path) -> None:
    def interrupt(request: str) -> None:
        if "preupload" in request:
            hub.heads["owner/new"] = "abcdef" * 6 + "abcd"

    hub.interrupt = interrupt
    refused = ask(push_of(tiny_hub), HF_TOKEN=TOKEN)
    assert isinstance(refused, dict)
    assert "run the same command again" in refused["hint"]
    assert hub.files["owner/new"] == {}
