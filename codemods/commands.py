"""The rewrite as a LibCST codemod, for LibCST's own runner and for other tools built on it.

    python -m libcst.tool codemod -x codemods.commands.DecomposePlansCommand src/transformers/models

The runner shows a command one module at a time, so each plan is decided by the modeling source in the module's own
folder. Only `migrator rewrite` ensures that an owner and its copies change together or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import libcst as cst
from libcst.codemod import CodemodCommand, SkipFile
from libcst.metadata import MetadataWrapper

from codemods.files.sources import SourceFile
from codemods.inheritance.ownership import Tree
from codemods.reading.module import PlanLiteral
from codemods.rewriting.families import Family, evaluate_family, find_line, find_lines, resolve_edits
from codemods.rewriting.rewrite import build_plan_edits, check_rewritten
from codemods.rewriting.transform import to_param_level
from codemods.rewriting.transformers import PlanTransformer
from codemods.tree.selection import Suppressions
from codemods.tree.survey import expert_plans, find_plans
from plans.decompose import Edit

__all__ = ["DecomposePlansCommand"]


class DecomposePlansCommand(CodemodCommand):
    """Rewrite the plans of one module to the param-level form, as `migrator rewrite` does."""

    DESCRIPTION = "Rewrite parallel plans to the param-level form, expert parameter by expert parameter."

    def transform_module_impl(self, tree: cst.Module) -> cst.Module:
        """Return the module with its plans rewritten; findings become warnings.

        Args:
            tree: the module. The modeling source that decides on expert layouts is looked for beside the context's
                file name.

        Raises:
            SkipFile: the context has no file name.
            SourceError: modeling source in the module's folder cannot be read, or the result is not what the edits
                ask for.
        """
        if self.context.filename is None:
            raise SkipFile("the context has no file name, and expert layouts are read from the file's folder")
        source = SourceFile(Path(self.context.filename).absolute(), tree.bytes)
        if not expert_plans.matches_file(source.data):
            return tree
        files = Tree()
        files.add(source)
        edits = list(self._compute_edits(files, source))
        if not edits:
            return tree
        changes = [edit for literal, wanted in edits for _, edit in build_plan_edits(literal, wanted)]
        wrapper = self.context.wrapper
        if wrapper is None or wrapper.module is not tree:
            wrapper = MetadataWrapper(tree)
        result = wrapper.visit(PlanTransformer(changes))
        check_rewritten(source, files.module(source.path), edits, result.bytes)
        return result

    def _compute_edits(self, files: Tree, source: SourceFile) -> Iterator[tuple[PlanLiteral, tuple[Edit, ...]]]:
        suppressions = Suppressions()
        suppressions.read_comments(source)
        families = [Family(location, ()) for location in find_plans(files, source.path, expert_plans)]
        evaluations = [
            (family, evaluate_family(files, family, lambda path: None, to_param_level)) for family in families
        ]
        resolution = resolve_edits(files, evaluations, suppressions)
        for location, finding in resolution.findings:
            if not suppressions.is_suppressed(source.path, find_lines(files, location, finding.key), finding.code):
                line = find_line(files, location, finding.key)
                self.warn(f"{source.path}:{line} {finding.code} {finding.message}")
        for location, (_, edits) in resolution.edits.items():
            yield files.literal(location), edits
