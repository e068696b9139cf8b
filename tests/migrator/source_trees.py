"""Model trees for the commands that read source, and running those commands."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.codemods.helpers import PACKED, REGULAR, generated, write_tree
from tests.waiting import HANG_TIMEOUT

MIGRATOR = str(Path(sys.executable).with_name("migrator"))
MODELING = f"""{REGULAR}

class ToySparse(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = ToyExperts(config)


class ToyAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)


class ToyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = ToyAttention(config)
        self.mlp = ToySparse(config)


class ToyModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(2)])
"""
"""The modules that the plans of these trees name."""
OWNER, COPY = "toy/configuration_toy.py", "heir/configuration_heir.py"


# Runs each command in a fork of its own. Every other command would spend most of its time on imports.
SERVER = """
import json, os, signal, sys
import codemods.checking.check, codemods.comparing.difference, codemods.rewriting.transformers
from migrator.cli import main

for line in sys.stdin:
    call = json.loads(line)
    if not (child := os.fork()):
        signal.alarm(call["limit"])
        os.chdir(call["cwd"])
        os.environ.clear()
        os.environ.update(call["env"])
        for descriptor, name in enumerate([os.devnull, call["stdout"], call["stderr"]]):
            os.dup2(os.open(name, os.O_RDWR), descriptor)
        sys.argv = ["migrator", *call["arguments"]]
        main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def start_server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # which closes its input, and so ends it
    return server


def migrator(*arguments: object, cwd: Path, env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[bytes]:
    """Run a command as its script does, in a process of its own that has imported what reads source."""
    if not hasattr(os, "fork"):
        return subprocess.run([MIGRATOR, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, check=False)
    server = start_server()
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        call = {"arguments": list(map(str, arguments)), "cwd": str(cwd), "env": dict(env), "limit": int(HANG_TIMEOUT)}
        server.stdin.write(json.dumps(call | {"stdout": stdout.name, "stderr": stderr.name}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


def family(root: Path, packed: str = PACKED) -> Path:
    """Write a hand-written configuration and a model whose modular file inherits its plan."""
    return write_tree(
        root,
        {
            OWNER: packed,
            "toy/modeling_toy.py": MODELING,
            "heir/modular_heir.py": "from ..toy.configuration_toy import ToyConfig\n"
            "class HeirConfig(ToyConfig):\n    size = 1\n",
            COPY: generated("heir", packed.replace("ToyConfig", "HeirConfig")),
            "heir/modeling_heir.py": MODELING,
        },
    )


def texts(root: Path) -> dict[str, bytes]:
    """Return every Python file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.py"))}


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "core.autocrlf=false"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)
    return done.stdout.decode()


def commit_all(folder: Path, message: str = "more") -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--no-verify", "-m", message)
