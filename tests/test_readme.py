"""The commands of the README and of two docs, run for real: what they show is what they print."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from migrator.cli import main
from tests.forks import fork_transformers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
RESHARDING = (ROOT / "docs" / "resharding.md").read_text("utf-8")
JOBS = (ROOT / "docs" / "jobs.md").read_text("utf-8")
SHOWN = re.compile(r"<!-- checked: (\w+) -->\n```console\n\$ ([^\n]+)\n(.*?)```", re.DOTALL)
BLOCKS = [block for text in (README, RESHARDING, JOBS) for block in SHOWN.findall(text)]
TIMES = re.compile(r"\d+\.\d+ s\b|\d\.\d+e[-+]\d+")
LEFT_OUT = "[...]"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a tree of transformers and a tiny checkpoint, which the shown commands work on."""
    folder = tmp_path_factory.mktemp("readme")
    fork_transformers(folder / "src")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2, mlp_only_layers=[1])
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "tiny-qwen3-moe", max_shard_size="200KB")
    job = re.search(r"<!-- checked: short-job -->\n```toml\n(.*?)```", JOBS, re.DOTALL)
    assert job is not None
    (folder / "qwen3.toml").write_text(job[1])
    return folder


def test_every_command_is_shown():
    assert [name for name, _, _ in BLOCKS] == [
        "rewrite",
        "prove",
        "reshard",
        "validate",
        "move",
        "verify",
        "inspect",
        "run",
    ]


@pytest.mark.parametrize(("name", "command", "expected"), BLOCKS, ids=[name for name, _, _ in BLOCKS])
def test_output_is_what_the_readme_shows(workspace, name, command, expected, monkeypatch, capfd):
    # In this process, which has imported torch already; starting one for each command would take most of the time.
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "argv", command.split())
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    said = capfd.readouterr()
    assert stop.value.code == 0, said.err
    printed = TIMES.sub("#", said.out)
    pieces = [re.escape(piece.strip("\n")) for piece in TIMES.sub("#", expected).split(LEFT_OUT)]
    assert re.fullmatch(r".*\n".join(pieces) + r"\n*", printed, re.DOTALL), printed


def test_the_makefile_has_every_target_the_readme_names():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([\w-]+)", README)) <= targets
