"""Whether a copy whose owner is lost may come from a plan after all: some name in its modular file leads there."""

from __future__ import annotations

import re

from codemods.inheritance.ownership import PlanLocation, Tree

__all__ = ["can_derive_from"]

_IMPORT = re.compile(rb"^[ \t]*(?:from|import)[ \t]+([\w. \t]+)", re.MULTILINE)
_WORD = re.compile(rb"\w+")
_PREFIX = re.compile(r"^(?:configuration|modular|modeling)_")


def can_derive_from(tree: Tree, copy: PlanLocation, owner: PlanLocation) -> bool:
    """Say whether the modular file of a copy names a plan's class, its model, or a class or model that inherits it.

    Args:
        tree: reads files.
        copy: a plan in a generated file, the way from which to its owner is lost.
        owner: a plan that says the same.
    """
    generated_from = tree.source(copy.path).generated_from
    if generated_from is None:
        return False
    data = tree.source(copy.path.with_name(generated_from)).data
    classes = {(owner.path, owner.class_name.rpartition(".")[2])}
    waiting = list(classes)
    while waiting:
        _, parent = waiting.pop()
        new = {
            heir
            for by_name in (tree.modular_subclasses, tree.configuration_subclasses)
            for heir in by_name.get(parent, ())
        } - classes
        classes |= new
        waiting += new
    others = {(path.parent, name) for path, name in classes if path.parent != copy.path.parent}
    words = {word.decode("utf-8", "replace") for word in _WORD.findall(data)}
    modules = {
        _PREFIX.sub("", word.decode("utf-8", "replace"))
        for line in _IMPORT.findall(data)
        for word in _WORD.findall(line)
    }
    return any(name in words or folder.name in modules for folder, name in others)
