"""The layout of the experts that a plan key leads to, in every class that may be made for it.

Each way to the experts counts: both arms of a conditional expression, every branch, every class that a name may stand
for. If one of them is unknown, so is the layout, and the line that makes it unknown is named.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from codemods.models.attributes import Node
from codemods.models.describe import Model, load_model
from codemods.models.layouts import explain_decorators, list_expert_classes, read_class_layout
from codemods.models.model_files import find_modeling_files
from codemods.models.module_text import ModuleText
from plans.model_facts import ExpertLayout, UnreadLayout

__all__ = ["read_experts"]

_Layout = ExpertLayout | UnreadLayout

_BY_HAND = "check the layout and rewrite the entry by hand"
_NO_SOURCE = UnreadLayout(
    "no modeling file is beside it, and auto/modeling_auto.py maps its model type to none",
    "put the modeling file beside the configuration, or " + _BY_HAND,
)
_NO_EXPERTS = UnreadLayout(
    "no class of the modeling source assigns them, and none packs experts", "correct the key, or " + _BY_HAND
)
_PLAIN = rb"[ \t]*self\.(?:%b(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=)|(?:add_module|register_module)\()"
_SETTERS = re.compile(r"setattr|_modules|__dict__|set_submodule|add_module|register_module")
_SETS_ANY_NAME = re.compile(rb"\bsetattr\(\s*self\s*,\s*(?![\"'f])")


def read_experts(folder: Path, key: str, class_name: str = "", plan_file: Path | None = None) -> _Layout:
    """Return the layout of the experts that a key names, or why it is unknown.

    Args:
        folder: the model's folder.
        key: the key of the experts module.
        class_name: the class that has the plan; it decides where text and vision models differ.
        plan_file: the file with the plan, which may define the experts itself.

    Raises:
        SourceError: a modeling file cannot be read.
    """
    if not find_modeling_files(folder, plan_file):
        return _NO_SOURCE
    model = load_model(folder, plan_file)
    attribute = key.rpartition(".")[2]
    if cause := next(_explain_hidden_assignments(model, key), None):
        return UnreadLayout(cause, f"assign each module to `self` in a statement of its own, or {_BY_HAND}")
    nodes = model.find_nodes(key, "")
    layout = _combine(model, nodes) if nodes else None
    if class_name and not isinstance(layout, ExpertLayout) and (own := model.find_nodes(key, class_name)):
        layout = _combine(model, own)
    if layout is None and (assigned := model.find_assigned(attribute)):
        layout = _combine(model, assigned)
    return layout or _read_only_class(model)


def _read_only_class(model: Model) -> _Layout:
    """Return the layout of the only class that packs experts, for source that shows no way to it."""
    for module in model.source.files.values():
        if found := _SETS_ANY_NAME.search(module.data):
            where = module.top_level.format_line(found.start())
            return UnreadLayout(f"{where} sets attributes under computed names", _BY_HAND)
    classes = [one for one in list_expert_classes(model.source) if one]
    packing = [one for one in classes if read_class_layout(model.source, one) is not None]
    if len({one.name for one in packing}) > 1:
        return UnreadLayout("several classes pack experts, and no class of the source assigns them", _BY_HAND)
    return _combine(model, (Node("class", one) for one in packing)) or _NO_EXPERTS


def _combine(model: Model, nodes: Iterable[Node]) -> _Layout | None:
    """Return the layout of experts that may be any of several modules, None if there is none."""
    layouts = [_read_node(model, node) for node in sorted(nodes, key=_get_sort_key)]
    if unread := next((layout for layout in layouts if isinstance(layout, UnreadLayout)), None):
        return unread
    read = [layout for layout in layouts if isinstance(layout, ExpertLayout)]
    if len({layout.irregularity for layout in read}) > 1:
        names = " or ".join(dict.fromkeys(layout.where for layout in read))
        return UnreadLayout(f"it may be {names}, whose layouts differ", f"give each a plan of its own, or {_BY_HAND}")
    return read[0] if read else None


def _get_sort_key(node: Node) -> tuple[str, str, str]:
    return node.where, node.definition.where if node.definition else "", node.kind


def _read_node(model: Model, node: Node) -> _Layout:
    if node.kind == "unknown":
        return UnreadLayout(f"{node.where} {node.reason}".strip(), f"bring its source into the tree, or {_BY_HAND}")
    if node.definition is None:
        what = "a list of modules" if node.kind == "list" else f"a {node.kind}"
        return UnreadLayout(f"the modeling source makes {what} of it, no stacked parameters", "correct the key")
    layout = read_class_layout(model.source, node.definition)
    return layout or UnreadLayout(f"{node.definition.where} stacks no experts in `gate_up_proj`", "correct the key")


def _explain_hidden_assignments(model: Model, key: str) -> Iterator[str]:
    """Yield the lines that may put other modules on the way of a key than plain assignments show."""
    *_, attribute = parts = [part for part in key.split(".") if part.isidentifier()]
    for module in model.source.files.values():
        for part in parts:
            for offset in _find_hidden_assignments(module, part):
                yield f"{module.top_level.format_line(offset)} sets `{part}` in a way that is not read"
    for definition in model.source.classes.values():
        if definition.has_attribute(attribute):
            if found := _SETS_ANY_NAME.search(definition.data, definition.start, definition.end):
                yield f"{definition.format_line(found.start())} sets attributes under computed names"
            yield from explain_decorators(model.source, model.source.find_ancestry(definition).classes)


def _find_hidden_assignments(module: ModuleText, attribute: str) -> Iterator[int]:
    """Yield where statements assign an attribute by name, by a tuple, after `if` on one line or on another object."""
    plain = re.compile(_PLAIN % re.escape(attribute.encode()))
    for match in re.compile(rb"[.\"']%b\b(?!\()" % re.escape(attribute.encode())).finditer(module.data):
        start = module.data.rfind(b"\n", 0, match.start()) + 1
        end = module.data.find(b"\n", match.end())
        line = module.data[start : end if end >= 0 else len(module.data)]
        if plain.match(line) or line.lstrip().startswith(b"#") or not (b"=" in line or b"(" in line):
            continue
        if _is_store(line.decode("utf-8", "replace"), attribute):
            yield start


def _is_store(line: str, attribute: str) -> bool:
    """Return whether a line may assign an attribute; one that is no statement by itself may."""
    if _SETTERS.search(line):
        return re.search(rf"[\"'](?:[\w.*]*\.)?{re.escape(attribute)}[\"']", line) is not None
    try:
        parsed = ast.parse(f"{line.strip()} pass" if line.rstrip().endswith(":") else line.strip())
    except SyntaxError:
        return re.search(rf"\.{re.escape(attribute)}\b[\w.,() ]* = ", line) is not None
    extended = {id(node.target) for node in ast.walk(parsed) if isinstance(node, ast.AugAssign)}
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and _names_attribute(node, attribute)
        and (id(node) not in extended or ast.unparse(node.value) == "self")  # `cache.layers += […]` makes no module
        for node in ast.walk(parsed)
    )


def _names_attribute(node: ast.Attribute, attribute: str) -> bool:
    """Return whether an assignment's target is an attribute, or its forward: `layer.experts.forward`."""
    inner = node.value
    return node.attr == attribute or (isinstance(inner, ast.Attribute) and inner.attr == attribute)
