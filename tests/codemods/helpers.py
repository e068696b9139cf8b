"""Small model trees, and the two checks that every rewrite test goes through."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from codemods.tree.outcome import Outcome

REGULAR = """
@use_experts_implementation
class ToyExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))

    def forward(self, hidden_states, index, weights):
        gate, up = nn.functional.linear(hidden_states, self.gate_up_proj[0]).chunk(2, dim=-1)
        return nn.functional.linear(gate * up, self.down_proj[0])
"""

PACKED = """
class ToyConfig(PreTrainedConfig):
    base_model_tp_plan = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
"""

MIGRATED = PACKED.replace("packed_colwise", "moe_tp_gate_up_colwise").replace('"rowwise"', '"moe_tp_down_rowwise"')

HEADER = "# This file was automatically generated from src/transformers/models/{name}/modular_{name}.py.\n"


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Write files, dedented, below a folder."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return root


def generated(name: str, text: str) -> str:
    """Give a file the header of a generated one."""
    return HEADER.format(name=name) + textwrap.dedent(text).lstrip("\n")


def codes(outcome: Outcome) -> list[str]:
    return [found.finding.code for found in outcome.findings]


def rewrite(root: Path) -> Outcome:
    """Rewrite a tree for real; a second run must find nothing more to do."""
    outcome = plan_rewrites([root])
    written = write_changes(outcome.changes)
    assert (written.changes, written.errors) == (outcome.changes, ())
    again = plan_rewrites([root])
    assert again.changes == (), "a second run changes nothing"
    for change in outcome.changes:
        ast.parse(change.path.read_bytes())
    return outcome


def check_transformed(root: Path, before: str, after: str, modeling: str = REGULAR) -> Outcome:
    """A configuration beside a modeling file becomes exactly `after`, and nothing else in the tree changes."""
    write_tree(root, {"toy/configuration_toy.py": before, "toy/modeling_toy.py": modeling})
    outcome = rewrite(root)
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    expected = textwrap.dedent(after).lstrip("\n")
    ast.parse(expected)
    assert (root / "toy/configuration_toy.py").read_text("utf-8") == expected
    _only_values_differ(textwrap.dedent(before).lstrip("\n"), expected, outcome)
    return outcome


def check_noop(root: Path, text: str, modeling: str | None = REGULAR) -> Outcome:
    """A configuration beside a modeling file stays as it is, byte for byte."""
    files = {"toy/configuration_toy.py": text}
    write_tree(root, files if modeling is None else files | {"toy/modeling_toy.py": modeling})
    before = (root / "toy/configuration_toy.py").read_bytes()
    outcome = rewrite(root)
    assert outcome.changes == ()
    assert (root / "toy/configuration_toy.py").read_bytes() == before
    return outcome


def _only_values_differ(before: str, after: str, outcome: Outcome) -> None:
    """With the styles put back and the inserted entries taken out, the new text is the old one."""
    edits = [located.edit for change in outcome.changes for located in change.edits]
    restored = after
    for edit in edits:
        if hasattr(edit, "before"):
            restored = restored.replace(edit.style, edit.before)
        else:
            restored = "".join(line for line in restored.splitlines(keepends=True) if f'"{edit.key}"' not in line)
    assert restored == before


def chain(root, *, depth=3, last=""):
    """toy is hand-written; each next model's modular file inherits its config from the one before."""
    files = {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR}
    before, title_before = "toy", "Toy"
    for number in range(depth):
        name, title = f"m{number}", f"M{number}"
        rest = last if number == depth - 1 else ""
        files[f"{name}/modular_{name}.py"] = (
            f"from ..{before}.configuration_{before} import {title_before}Config\n"
            f"class {title}Config({title_before}Config):\n    size = {number}\n{rest}"
        )
        files[f"{name}/configuration_{name}.py"] = generated(name, PACKED.replace("ToyConfig", f"{title}Config"))
        files[f"{name}/modeling_{name}.py"] = REGULAR
        before, title_before = name, title
    return write_tree(root, files)
