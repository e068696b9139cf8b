"""Model trees for the commands that read source, and running those commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.codemods.helpers import PACKED, REGULAR, generated, write_tree

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


def migrator(*arguments, cwd, **keywords):
    return subprocess.run([MIGRATOR, *map(str, arguments)], cwd=cwd, capture_output=True, check=False, **keywords)


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
