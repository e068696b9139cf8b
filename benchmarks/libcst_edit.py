"""The same edit as an ordinary LibCST codemod, for LibCST's own runner: what `benchmarks/rewrite.py` compares with."""

from __future__ import annotations

import libcst as cst
from libcst.codemod import VisitorBasedCodemodCommand

STYLES = {"experts.gate_up_proj": "moe_tp_gate_up_colwise", "experts.down_proj": "moe_tp_down_rowwise"}
REPLACED = {"packed_colwise", "rowwise"}


class ExpertStyles(VisitorBasedCodemodCommand):
    """Gives expert parameters in dict displays their param-level styles, asking nothing else."""

    DESCRIPTION = "packed expert styles become param-level ones"

    def leave_DictElement(self, original_node: cst.DictElement, updated_node: cst.DictElement) -> cst.DictElement:
        key, value = updated_node.key, updated_node.value
        if not (isinstance(key, cst.SimpleString) and isinstance(value, cst.SimpleString)):
            return updated_node
        for suffix, style in STYLES.items():
            if str(key.evaluated_value).endswith(suffix) and value.evaluated_value in REPLACED:
                return updated_node.with_changes(value=cst.SimpleString(f'"{style}"'))
        return updated_node
