"""A checkpoint laid out for a target: the files of the result, one way for each layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from plans.errors import MismatchError
from plans.placement import Replicate
from plans.resolved import ResolvedPlan
from runtime.checkpoint.config_record import record_of
from runtime.checkpoint.content import Content, Held, Layout
from runtime.checkpoint.copying.new_file import NewFile
from runtime.checkpoint.dcp.files import dcp_files
from runtime.checkpoint.files.file_names import INDEX, MARKER, check_apart_names
from runtime.checkpoint.hub.files import hub_files, index_text
from runtime.checkpoint.hub.form import default_form
from runtime.checkpoint.optimizer.files import optimizer_files
from runtime.checkpoint.optimizer.state import OptimizerState
from runtime.checkpoint.ranks.files import lay_out as lay_out_rank
from runtime.checkpoint.record import MANIFEST, Entry, Manifest
from runtime.checkpoint.target import Target
from runtime.planning.plan import Plan
from runtime.planning.resolve import resolve
from runtime.proof import prove

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LaidOut", "lay_out"]

_WHOLE = (Replicate(), Replicate())


@dataclass(frozen=True)
class LaidOut:
    """The files of a result, before they are written.

    Args:
        files: with tensors.
        resolved: the plan that they are laid out by, None for hub form.
        manifest: of the result, digests still empty; None for hub form.
        texts: other files that are made, by name.
    """

    files: tuple[NewFile, ...]
    resolved: ResolvedPlan | None = None
    manifest: Manifest | None = None
    texts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all files that are made."""
        manifest = (MANIFEST,) if self.manifest else ()
        return (*(file.name for file in self.files), *self.texts, *manifest)


def lay_out(content: Content, model: PreTrainedModel, target: Target) -> LaidOut:
    """Lay a checkpoint's tensors out in the files of a target.

    Args:
        content: what there is.
        model: that it is of, on meta.
        target: what it is to become.

    Raises:
        FormError: a tensor of elements smaller than a byte would be cut within one, or groups do not divide.
        CheckpointError: the tensors cannot be brought to hub form, or files would have one name.
        PlanError: the plan does not resolve on this model and mesh.
        MismatchError: the checkpoint's shapes are not the model's.
    """
    laid = _LAYOUTS[target.layout](content, model, target)
    laid = replace(laid, texts={**laid.texts, **content.made})
    if content.optimizer is not None:
        laid = _with_optimizer(laid, content.optimizer)
    prove(_is_whole(laid, content), "a tensor would be left out")
    check_apart_names(content.folder, (*laid.names, *content.side.copied, MARKER))
    return laid


def _is_whole(laid: LaidOut, content: Content) -> bool:
    """Return whether every tensor of the source, and of the plan, goes into some file, empty ones too."""
    held = content.all_forms
    if laid.resolved is None:
        used = {source for file in laid.files for _, form in file.tensors for source in form.sources}
        return all(used >= set(form.sources) for form in held.values())
    laid_out = {at.name for file in laid.files for at, _ in file.tensors}
    planned = {parameter.name for parameter in laid.resolved.parameters if parameter.kind != "tied"}
    return laid_out >= planned | held.keys()


def _with_optimizer(laid: LaidOut, state: OptimizerState) -> LaidOut:
    files, texts = optimizer_files(state, laid.resolved)
    manifest = laid.manifest and replace(laid.manifest, optimizer=dict.fromkeys(state.tensors, ""))
    return replace(laid, files=(*laid.files, *files), manifest=manifest, texts={**laid.texts, **texts})


def _as_hub(content: Content, model: PreTrainedModel, target: Target) -> LaidOut:
    known = content.stored_form if target.experts is None else None
    form = known or default_form(content, model, target.experts or "separate")
    index = index_text(form)
    files = hub_files(content, model, form)
    if known is not None:
        files = tuple(replace(file, may_grow=False) for file in files)
    return LaidOut(files, texts={INDEX: index} if index is not None else {})


def _as_ranks(content: Content, model: PreTrainedModel, target: Target) -> LaidOut:
    resolved = _resolved(model, target)
    manifest = _manifest(content, resolved)
    ranks = range(resolved.mesh.world_size)
    files = (lay_out_rank(rank, resolved.mesh, manifest.tensors, content.forms) for rank in ranks)
    return LaidOut(tuple(files), resolved, manifest)


def _as_dcp(content: Content, model: PreTrainedModel, target: Target) -> LaidOut:
    resolved = _resolved(model, target)
    manifest = _manifest(content, resolved)
    return LaidOut(dcp_files(resolved.mesh, manifest.tensors, content.forms, content.tied), resolved, manifest)


def _resolved(model: PreTrainedModel, target: Target) -> ResolvedPlan:
    """Resolve the model's plan; where no axis of a plan has more than one rank, a model may do without."""
    needs_none = target.mesh.tp == target.mesh.ep == 1 and not model.tp_plan
    return resolve(model, target.mesh, target.mode, Plan(target.mode, {}) if needs_none else None)


def _manifest(content: Content, resolved: ResolvedPlan) -> Manifest:
    """Return the manifest of a result, digests still empty."""
    return Manifest(
        written_by=_versions(),
        model_type=resolved.model_type,
        mode=resolved.mode,
        dialect=resolved.dialect,
        mesh=resolved.mesh,
        plan=resolved.plan,
        tensors={name: _entry(name, held, resolved) for name, held in content.tensors.items()},
        tied=content.tied,
        stored_form=content.stored_form,
        config=record_of(content),
    )


def _entry(name: str, held: Held, resolved: ResolvedPlan) -> Entry:
    """Return what the manifest says of a tensor, carried ones whole."""
    parameter = resolved.by_name[name] if held.kind != "carried" else None
    if parameter is None:
        return Entry(held.kind, held.dtype, held.shape, "dense", _WHOLE)
    if parameter.shape != held.shape:
        raise MismatchError(
            f"{name} is {list(parameter.shape)} in the model but {list(held.shape)} in the checkpoint",
            hint="config.json does not belong to these weights",
            name=name,
        )
    return Entry(held.kind, held.dtype, held.shape, parameter.mesh, parameter.placements)


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name, distribution in (("migrator", "plan-migrator"), ("torch", "torch"), ("transformers", "transformers")):
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return versions


_LAYOUTS: Mapping[Layout, Callable[[Content, PreTrainedModel, Target], LaidOut]] = {
    "hf": _as_hub,
    "dcp": _as_dcp,
    "ranks": _as_ranks,
}
