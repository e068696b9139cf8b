"""The edits of `migrator rewrite` as an ordinary LibCST codemod, which `benchmarks/rewrite.py` compares it with."""

from __future__ import annotations

import libcst as cst
from libcst.codemod import VisitorBasedCodemodCommand

STYLES = {"experts.gate_up_proj": "moe_tp_gate_up_colwise", "experts.down_proj": "moe_tp_down_rowwise"}
REPLACED = {"packed_colwise", "rowwise"}


class ExpertStyles(VisitorBasedCodemodCommand):
    """Give expert parameters in dict displays their param-level styles, without any check of models or owners."""

    DESCRIPTION = "packed expert styles become param-level ones"

    def leave_DictElement(self, original_node: cst.DictElement, updated_node: cst.DictElement) -> cst.DictElement:
        key, value = updated_node.key, updated_node.value
        if not (isinstance(key, cst.SimpleString) and isinstance(value, cst.SimpleString)):
            return updated_node
        for suffix, style in STYLES.items():
            if str(key.evaluated_value).endswith(suffix) and value.evaluated_value in REPLACED:
                return updated_node.with_changes(value=cst.SimpleString(f'"{style}"'))
        return updated_node
