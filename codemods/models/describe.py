"""What a plan key names, worked out from the model's own modeling source.

A key is walked part by part: from a class to what its attributes hold, which is read from the assignments in its
methods. Only the statements on that way are parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path

from codemods.models.attributes import AttributeResolver, Node
from codemods.models.hidden import find_hidden_assignments
from codemods.models.modeling import ModelingSource, load_modeling
from codemods.models.module_text import ELEMENT
from plans.model_facts import KeyTarget, TargetKind

__all__ = ["Model", "describe", "load_model"]

_MAX_KEY_DEPTH = 64  # parts of a key; no model nests like that
_WEIGHT_RANK = 2
_STACKED_RANK = 3


class Model:
    """Answers what plan keys name in one model.

    Args:
        folder: the model's folder, whose modeling files are read now.
        plan_file: the file with the model's plan, which may define its modules too.

    Raises:
        SourceError: a modeling file cannot be read.
    """

    def __init__(self, folder: Path, plan_file: Path | None = None) -> None:
        self.source = load_modeling(folder, plan_file)
        self._attributes = AttributeResolver(self.source)
        self.find_nodes = cache(self._walk_key)

    def describe(self, key: str, class_name: str = "") -> KeyTarget | None:
        """Return what a key names, None where the source does not show it or shows two different things.

        Args:
            key: a plan key, relative to any class of the model: `layers.*.self_attn.q_proj`.
            class_name: the class that has the plan; it decides where a key means different things in text and vision
                models.
        """
        targets = self._describe_nodes(self.find_nodes(key, ""))
        if len(targets) != 1 and class_name:
            targets = self._describe_nodes(self.find_nodes(key, class_name))
        return targets.pop() if len(targets) == 1 else None

    def can_exist(self, key: str) -> bool:
        """Return whether any class of the model could create what a key names.

        It could if no class can be read, or if a module on the key's way is assigned in a form that is not.
        """
        if not self.source.classes or self.find_nodes(key, ""):
            return True
        parts = [part for part in key.split(".") if part.isidentifier()]
        files = self.source.files.values()
        return any(next(find_hidden_assignments(file, part), None) is not None for part in parts for file in files)

    def _walk_key(self, key: str, class_name: str) -> frozenset[Node]:
        """Return what a key leads to, starting from the classes that it may be relative to."""
        owner, _, part = key.rpartition(".")
        if owner.count(".") > _MAX_KEY_DEPTH:
            return frozenset()
        nodes = self.find_nodes(owner, class_name) if owner else self._find_roots(part, class_name)
        return frozenset(node for start in nodes for node in self._follow_part(start, part))

    def _find_roots(self, part: str, class_name: str) -> frozenset[Node]:
        """Return the classes that a key beginning with `part` may be relative to, configurations apart.

        They are the named class itself or those that take it as their `config`; without a name, all classes. Those that
        inherit from other models could have any attribute, so they count only if no class assigns this one.
        """
        classes = {name: one for name, one in self.source.classes.items() if not name.endswith("Config")}
        takes_config = re.compile(rb"\bconfig: [\w| ]*\b" + re.escape(class_name.encode()) + rb"\b")
        names = (
            [class_name]
            if class_name in classes
            else [
                owner.name
                for owner in classes.values()
                if not class_name or takes_config.search(owner.data, owner.start, owner.end)
            ]
        )
        definitions = [classes[name] for name in names]
        assigning = [
            definition
            for definition in definitions
            if any(one.has_attribute(part) for one in self.source.find_ancestry(definition).classes)
        ]
        return frozenset(Node("class", definition) for definition in assigning or definitions)

    def find_assigned(self, attribute: str) -> frozenset[Node]:
        """Return what an attribute may hold in any class of the model's own files that assigns it."""
        assigning = [one for one in self.source.classes.values() if one.has_attribute(attribute)]
        return frozenset(node for one in assigning for node in self._attributes.resolve(one, attribute))

    def _describe_nodes(self, nodes: frozenset[Node]) -> set[KeyTarget]:
        known = sorted((node for node in nodes if node.kind != "unknown"), key=str)
        targets = map(self._build_target, known)
        return set({(target.kind, target.ndim): target for target in targets}.values())

    def _follow_part(self, node: Node, part: str) -> Iterable[Node]:
        is_index = part == "*" or part.isdecimal()
        if node.kind == "unknown":
            return [node]
        if node.kind == "list":
            return node.elements | self._read_attribute(node, ELEMENT if is_index else part)
        if node.kind in ("linear", "embedding") and part in ("weight", "bias"):
            return [Node("parameter", rank=_WEIGHT_RANK if part == "weight" else 1)]
        if node.kind == "leaf":
            return [Node("parameter")] if part in ("weight", "bias") else []
        return self._read_attribute(node, part)

    def _read_attribute(self, node: Node, part: str) -> frozenset[Node]:
        return self._attributes.resolve(node.definition, part) if node.definition else frozenset()

    def _build_target(self, node: Node) -> KeyTarget:
        return KeyTarget(self._classify_node(node), node.rank, self._locate(node))

    def _classify_node(self, node: Node) -> TargetKind:
        match node.kind:
            case "linear" | "embedding" | "parameter":
                return node.kind
            case "class" if any(held.rank == _STACKED_RANK for held in self._iter_attribute_nodes(node)):
                return "experts"
        return "module"

    def _iter_attribute_nodes(self, node: Node) -> Iterator[Node]:
        if node.definition is not None:
            for ancestor in self.source.find_ancestry(node.definition).classes:
                for attribute in ancestor.attributes:
                    yield from self._attributes.resolve(node.definition, attribute)

    def _locate(self, node: Node) -> str:
        return node.definition.where if node.definition else ""


def describe(folder: Path, key: str, class_name: str = "") -> KeyTarget | None:
    """Return what a plan key names in a model, None where its source does not show it.

    Args:
        folder: the model's folder.
        key: the plan key.
        class_name: the class that has the plan.
    """
    return load_model(folder).describe(key, class_name)


def load_model(folder: Path, plan_file: Path | None = None) -> Model:
    """Return the model of a folder, the same one until its files change.

    Args:
        folder: the model's folder.
        plan_file: the file with the model's plan, which may define its modules too.
    """
    return _load_model(folder, plan_file, load_modeling(folder, plan_file))


@lru_cache(maxsize=1024)
def _load_model(folder: Path, plan_file: Path | None, _source: ModelingSource) -> Model:
    return Model(folder, plan_file)
