"""The whole story on real input: rewrite the installed transformers' models and prove them, reshard a checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

MIGRATOR = str(Path(sys.executable).with_name("migrator"))


def main() -> None:
    with workplace(sys.argv[1:]) as folder:
        copy_tree(folder / "transformers")
        say("1. Rewrite the models folder of the installed transformers (a copy).")
        run(MIGRATOR, "rewrite", "transformers/models", cwd=folder, last=8)
        say("   One of the diffs:")
        run("git", "diff", "--", "transformers/models/mixtral", cwd=folder)
        say("2. Prove it: tiny models of the tree's own code, on two ranks, against the unsharded ones.")
        run(MIGRATOR, "prove", "transformers/models/mixtral", "transformers/models/qwen3_moe", cwd=folder)
        say("3. Make a tiny Qwen3-MoE with transformers' own save_pretrained, split over several files.")
        make_checkpoint(folder / "tiny-qwen3-moe")
        print("  ", *sorted(path.name for path in (folder / "tiny-qwen3-moe").iterdir()), flush=True)
        say("4. Where its parameters go on two ranks.")
        run(MIGRATOR, "plan", "tiny-qwen3-moe", "--tp", "2", cwd=folder)
        say("5. Lay it out for two ranks.")
        run(MIGRATOR, "reshard", "tiny-qwen3-moe", "out", "--tp", "2", "--layout", "ranks", cwd=folder)
        say("6. Prove it on two processes, against the unsharded model.")
        run(MIGRATOR, "validate", "out", "--tp", "2", "--reference", "tiny-qwen3-moe", cwd=folder)


@contextmanager
def workplace(arguments: list[str]) -> Iterator[Path]:
    """Give a folder to work in: the one asked for, which stays, or one that goes afterwards."""
    if arguments:
        folder = Path(arguments[0]).absolute()
        folder.mkdir(parents=True)
        yield folder
        print(f"\nAll of it is in {folder}; the command is {MIGRATOR}")
        return
    with tempfile.TemporaryDirectory(prefix="migrator-demo-") as name:
        yield Path(name)


def copy_tree(destination: Path) -> None:
    """Copy the models of the installed transformers, link the rest, and commit it for `git diff`."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    shutil.copytree(installed / "models", destination / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for path in installed.iterdir():
        if path.name not in ("models", "__pycache__"):
            (destination / path.name).symlink_to(path)
    author = ["-c", "user.name=demo", "-c", "user.email=demo@example.invalid"]
    for arguments in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "as installed"]):
        subprocess.run(["git", *arguments], cwd=destination.parent, check=True)


def make_checkpoint(destination: Path) -> None:
    """Save a tiny Qwen3-MoE with random weights, sparse and dense layers, over several files."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    )
    Qwen3MoeForCausalLM(config).save_pretrained(destination, max_shard_size="200KB")


def say(text: str) -> None:
    print(f"\n{text}\n", flush=True)


def run(*command: str, cwd: Path, last: int | None = None) -> None:
    """Show a command and its output, or the last lines of it."""
    shown = " ".join((Path(command[0]).name, *command[1:]))
    print(f"$ {shown}", flush=True)
    environment = {**os.environ, "GIT_PAGER": "cat"}
    done = subprocess.run(command, cwd=cwd, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    lines = done.stdout.splitlines()
    if last is not None and len(lines) > last:
        print(f"[{len(lines) - last} lines more]")
        lines = lines[-last:]
    print("\n".join(lines), flush=True)
    if done.returncode:
        sys.exit(f"{shown} exited with {done.returncode}")


if __name__ == "__main__":
    main()
