"""Plans as Python itself sees them: modules of a written tree are imported in another process before and after.

Run as a script, this is that process: it reads a folder and module names as a line of JSON, imports them, and writes
the plans of every class, of its instances in every arm, and the errors of modules that cannot be imported.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BASE = """
class PreTrainedConfig:
    def __init_subclass__(cls, **keywords):
        for name, value in keywords.items():
            setattr(cls, "base_model_tp_plan" if name == "tp_plan" else name, value)

    def __init__(self, **keywords):
        pass
"""

OLD = frozenset({"packed_colwise", "rowwise"})
NEW = frozenset({"moe_tp_gate_up_colwise", "moe_tp_down_rowwise"})
_PARAMETER = re.compile(r"((?:.*\.)?experts)\.(?:gate_up_proj|down_proj)")
_PLANS = tuple(f"{prefix}{kind}_plan" for prefix in ("base_model_", "_", "") for kind in ("tp", "sp"))
_ARMS = ({}, {"new": True}, {"new": False})


@dataclass(frozen=True)
class Evaluation:
    """The plans of a tree by class, object and attribute, and why modules could not be imported."""

    plans: dict[str, dict[str, str]]
    errors: list[str]

    def vocabularies(self) -> dict[str, set[str]]:
        """Return, for each experts module of each plan, which of the two vocabularies its styles are from."""
        found: dict[str, set[str]] = {}
        for name, plan in self.plans.items():
            for key, style in plan.items():
                if match := _PARAMETER.fullmatch(key):
                    words = "old" if style in OLD else "new" if style in NEW else style
                    found.setdefault(f"{name}: {match[1]}", set()).add(words)
        return found


class Evaluator:
    """Imports modules in a process of its own, which lives until it is closed."""

    def __init__(self) -> None:
        command = [sys.executable, "-B", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def evaluate(self, root: Path) -> Evaluation:
        """Import every module of the package `tree` below a folder, except modeling files."""
        files = sorted((root / "tree").rglob("*.py"), key=lambda path: (len(path.parts), path))
        names = [".".join(path.relative_to(root).with_suffix("").parts) for path in files]
        names = [name for name in names if "modeling_" not in name and "__init__" not in name]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(root), "names": names}) + "\n")
        self._process.stdin.flush()
        return Evaluation(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _import_all(folder: str, names: list[str]) -> dict[str, object]:
    sys.path.insert(0, folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tree"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    modules, errors = [], []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except Exception as error:
            errors.append(f"{name}: {error!r}")
    sys.path.remove(folder)
    plans: dict[str, dict[str, str]] = {}
    for module in modules:
        for class_name, value in list(vars(module).items()):
            if inspect.isclass(value):
                plans |= _read_plans(f"{module.__name__}.{class_name}", value)
    return {"plans": plans, "errors": errors}


def _read_plans(name: str, owner: type) -> dict[str, dict[str, str]]:
    objects: dict[str, object] = {"class": owner}
    for arm in _ARMS:
        try:
            objects[f"instance {arm}"] = owner(**arm)
        except Exception:  # a class that cannot be made so
            continue
    plans = {}
    for label, holder in objects.items():
        for attribute in _PLANS:
            try:
                value = getattr(holder, attribute)
                value = value() if callable(value) else value
                entries = {str(key): str(getattr(style, "value", style)) for key, style in dict(value).items()}
            except Exception:  # no plan
                continue
            plans[f"{name} {label} {attribute}"] = entries
    return plans


if __name__ == "__main__":
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):  # what the modules print is no answer
            answer = json.dumps(_import_all(**json.loads(line)))
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()
