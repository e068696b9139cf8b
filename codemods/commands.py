"""The rewrite as a LibCST codemod, for LibCST's own runner and for other tools built on it.

    python -m libcst.tool codemod -x codemods.commands.DecomposePlansCommand src/transformers/models

The runner shows a command one module at a time. So each plan is judged by the modeling source in the module's own
folder; that an owner and its copies change together or not at all is what only `migrator rewrite` sees to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import libcst as cst
from libcst.codemod import CodemodCommand, SkipFile

from codemods.files.sources import SourceFile
from codemods.inheritance.ownership import Tree
from codemods.reading.module import PlanLiteral
from codemods.rewriting.families import Family, evaluate_family, find_line, find_lines, resolve_edits
from codemods.rewriting.rewrite import rewrite_source
from codemods.rewriting.transform import to_param_level
from codemods.tree.selection import Suppressions
from codemods.tree.survey import expert_plans, find_plans
from plans.decompose import Edit

__all__ = ["DecomposePlansCommand"]


class DecomposePlansCommand(CodemodCommand):
    """Gives the plans of one module their param-level form, as `migrator rewrite` does."""

    DESCRIPTION = "Rewrite parallel plans to the param-level form, expert parameter by expert parameter."

    def transform_module_impl(self, tree: cst.Module) -> cst.Module:
        """Return the module with its plans rewritten; what a person should know becomes a warning.

        Args:
            tree: the module; the context's file name says whose modeling source decides on layouts.

        Raises:
            SkipFile: the context has no file name.
            SourceError: modeling source in the module's folder cannot be read.
        """
        if self.context.filename is None:
            raise SkipFile("plans cannot be judged without a file name: expert layouts are read from its folder")
        source = SourceFile(Path(self.context.filename).absolute(), tree.bytes)
        if not expert_plans.matches_file(source.data):
            return tree
        files = Tree()
        files.add(source)
        edits = list(self._compute_edits(files, source))
        if not edits:
            return tree
        return cst.parse_module(rewrite_source(source, files.module(source.path), edits), tree.config_for_parsing)

    def _compute_edits(self, files: Tree, source: SourceFile) -> Iterator[tuple[PlanLiteral, tuple[Edit, ...]]]:
        silencer = Suppressions()
        silencer.read_comments(source)
        alone = [Family(place, ()) for place in find_plans(files, source.path, expert_plans)]
        verdicts = [(family, evaluate_family(files, family, lambda path: None, to_param_level)) for family in alone]
        decided = resolve_edits(files, verdicts, silencer)
        for place, finding in decided.findings:
            if not silencer.is_suppressed(source.path, find_lines(files, place, finding.key), finding.code):
                line = find_line(files, place, finding.key)
                self.warn(f"{source.path}:{line} {finding.code} {finding.message}")
        for place, (_, edits) in decided.edits.items():
            yield files.literal(place), edits
