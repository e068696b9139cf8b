"""What a plan key names, read from the model's own modeling source by walking the key part by part."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path

from codemods.models.construct import AttributeResolver
from codemods.models.modeling import ELEMENT, UNKNOWN, Node, read_modeling
from plans.model_facts import KeyTarget, TargetKind

__all__ = ["Model", "describe"]

_MAX_KEY_DEPTH = 64  # parts of a key; no model nests like that
_WEIGHT_RANK = 2
_STACKED_RANK = 3


class Model:
    """One model folder's modeling source, asked about plan keys; read when it is made, so keep it."""

    def __init__(self, folder: Path) -> None:
        self._source = read_modeling(folder)
        self._attributes = AttributeResolver(self._source)
        self.find_nodes = cache(self._walk_key)

    def describe(self, key: str, class_name: str = "") -> KeyTarget | None:
        """Return what a key names, None where the source does not show it or shows two different things.

        Args:
            key: a plan key, which may count from any class of the model: `layers.*.self_attn.q_proj`.
            class_name: the class whose plan it is; where text and vision models differ, it decides between them.
        """
        found = self._describe_nodes(self.find_nodes(key, ""))
        if len(found) != 1 and class_name:
            found = self._describe_nodes(self.find_nodes(key, class_name))
        return found.pop() if len(found) == 1 else None

    def can_exist(self, key: str) -> bool:
        """Say whether any class of the model could create what a key names; of unreadable source it is always true."""
        return not self._source.classes or bool(self.find_nodes(key, ""))

    def _walk_key(self, key: str, class_name: str) -> frozenset[Node]:
        """Return what the parts of a key lead to, from the classes on whose plan it may be."""
        owner, _, part = key.rpartition(".")
        if owner.count(".") > _MAX_KEY_DEPTH:
            return frozenset()
        nodes = self.find_nodes(owner, class_name) if owner else self._find_roots(part, class_name)
        return frozenset(node for start in nodes for node in self._follow_part(start, part))

    def _find_roots(self, part: str, class_name: str) -> frozenset[Node]:
        """Return the classes that a key beginning with `part` may count from.

        They are the named class itself, those that take it as their `config`, or without a name all. Those that inherit
        from other models could have any attribute, and count only where no other class has this one.
        """
        classes = self._source.classes
        takes = re.compile(rb"\bconfig: [\w| ]*\b" + re.escape(class_name.encode()) + rb"\b")
        names = (
            [class_name]
            if class_name in classes
            else [name for name, one in classes.items() if not class_name or takes.search(one.data, one.start, one.end)]
        )
        assigning = [name for name in names if any(one.has_attribute(part) for one in self._source.mro(name))]
        return frozenset(Node("class", name) for name in assigning or names)

    def _describe_nodes(self, nodes: frozenset[Node]) -> set[KeyTarget]:
        by_kind = {
            (described.kind, described.ndim): described
            for described in map(self._build_target, sorted(nodes - {UNKNOWN}, key=str))
        }
        return set(by_kind.values())

    def _follow_part(self, node: Node, part: str) -> Iterable[Node]:
        is_index = part == "*" or part.isdecimal()
        if node.kind == "unknown":
            return [UNKNOWN]
        if node.kind == "list":
            return node.elements | self._read_attribute(node, ELEMENT if is_index else part)
        if node.kind in ("linear", "embedding") and part in ("weight", "bias"):
            return [Node("parameter", rank=_WEIGHT_RANK if part == "weight" else 1)]
        if node.kind == "leaf":
            return [Node("parameter")] if part in ("weight", "bias") else []
        return self._read_attribute(node, part)

    def _read_attribute(self, node: Node, part: str) -> frozenset[Node]:
        return self._attributes.resolve(node.name, part) if node.name else frozenset()

    def _build_target(self, node: Node) -> KeyTarget:
        return KeyTarget(self._classify_node(node), node.rank, self._locate(node))

    def _classify_node(self, node: Node) -> TargetKind:
        match node.kind:
            case "linear" | "embedding" | "parameter":
                return node.kind
            case "class" if any(one.rank == _STACKED_RANK for one in self._iterate_parameters(node.name)):
                return "experts"
        return "module"

    def _iterate_parameters(self, name: str) -> Iterator[Node]:
        for definition in self._source.mro(name):
            for attribute in definition.attributes:
                yield from self._attributes.resolve(name, attribute)

    def _locate(self, node: Node) -> str:
        definition = self._source.classes.get(node.name)
        return f"{definition.path.name}:{definition.name}" if definition else ""


def describe(folder: Path, key: str, class_name: str = "") -> KeyTarget | None:
    """Return what a plan key names in a model folder, None where that cannot be read."""
    return _load_model(folder).describe(key, class_name)


def _load_model(folder: Path) -> Model:
    """Return a folder's model, read again only if its modeling files changed."""
    with os.scandir(folder) as entries:
        stats = [entry.stat() for entry in entries if entry.name.startswith("modeling_")]
    return _load_model_state(folder, tuple(sorted((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)))


@lru_cache(maxsize=1024)
def _load_model_state(folder: Path, _state: tuple[tuple[int, int, int], ...]) -> Model:
    return Model(folder)
