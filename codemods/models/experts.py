"""The layout of the experts that a plan key leads to, in every class that may be made for it.

Each way to the experts counts: both arms of a conditional expression, every branch, every class that a name may stand
for. If one of them is unknown, so is the layout, and the line that makes it unknown is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from codemods.models.attributes import Node
from codemods.models.describe import Model, load_model
from codemods.models.hidden import SETS_ANY_NAME, find_hidden_assignments
from codemods.models.layouts import explain_decorators, list_expert_classes, read_class_layout
from codemods.models.model_files import find_modeling_files
from plans.model_facts import ExpertLayout, UnreadLayout

__all__ = ["read_experts"]

_Layout = ExpertLayout | UnreadLayout

_BY_HAND = "check the layout and rewrite the entry by hand"
_NO_SOURCE = UnreadLayout(
    "no modeling file is beside it, and auto/modeling_auto.py maps its model type to no class that is found in one",
    "put the modeling file beside the configuration, or " + _BY_HAND,
)
_NO_EXPERTS = UnreadLayout(
    "no class of the modeling source assigns them, and none packs experts", "correct the key, or " + _BY_HAND
)


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
        if found := SETS_ANY_NAME.search(module.data):
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
            for offset in find_hidden_assignments(module, part):
                yield f"{module.top_level.format_line(offset)} sets `{part}` in a way that is not read"
    for definition in model.source.classes.values():
        if definition.has_attribute(attribute):
            if found := SETS_ANY_NAME.search(definition.data, definition.start, definition.end):
                yield f"{definition.format_line(found.start())} sets attributes under computed names"
            yield from explain_decorators(model.source, model.source.find_ancestry(definition).classes)
