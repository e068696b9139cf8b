"""What tests do with a git repository of real model folders, which the fixture `root` copies for each of them."""

from __future__ import annotations

import subprocess

from codemods.comparing.difference import compare
from codemods.files.revisions import find_repository

MODELS = ("mixtral", "qwen3_moe", "mellum", "gemma4", "llama4", "llama")
PACKAGE = "src/transformers"
MIXTRAL = f"{PACKAGE}/models/mixtral/configuration_mixtral.py"
CHILD = f"{PACKAGE}/models/offspring/configuration_offspring.py"
OFFSPRING = """
from ..mixtral.configuration_mixtral import MixtralConfig


class OffspringConfig(MixtralConfig):
    model_type = "offspring"
"""

Q_PROJ = "layers.*.self_attn.q_proj"
ADDED = "\n    def __post_init__(self, **kwargs):\n        {}\n        super().__post_init__(**kwargs)\n"


def git(folder, *arguments):
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "core.autocrlf=false"]
    return subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True).stdout.decode()


def commit(folder, message):
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


def edit(root, name, before, after):
    text = (root / name).read_text()
    assert before in text
    (root / name).write_text(text.replace(before, after))


def differences(root, base="HEAD", head=None):
    repository = find_repository(root)
    after = repository.read_revision(head) if head else repository.read_working_tree()
    found = compare(repository.read_revision(base), after)
    assert found.errors == ()
    return found.differences


def summarize(found):
    return [(one.model, one.key, one.kind, one.explained) for one in found]
