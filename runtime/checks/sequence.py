"""Checks of a residual stream that is sharded along the sequence: where it begins, is normalized, and ends.

An explicit plan may forget one of these places. The stream would meet a whole tensor there, and torch would only report
that it cannot add the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from plans.errors import PlanError
from plans.plan import choose_key
from runtime.checks.plan_view import PlanView
from runtime.styles.style import ParallelStyle

__all__ = ["check_sequence_plan", "find_scattering_embedding", "is_norm"]

ModuleStyles = Mapping[str, ParallelStyle]
"""The styles of module entries, by module name."""


def check_sequence_plan(view: PlanView) -> None:
    """Check that no module passes slices of the sequence to one that does not expect them.

    Raises:
        PlanError: one does; names the module and the entry that is missing or wrong.
    """
    styles = _get_module_styles(view)
    if not any(style.gives == "sequence" and style.takes != "sequence" for style in styles.values()):
        _check_no_sequence_slices(view, styles)
        return
    embedding = _find_module_name(view, "get_input_embeddings")
    head = _find_module_name(view, "get_output_embeddings")
    if embedding is not None and not _returns_slices(styles.get(embedding)):
        raise _build_missing_entry_error(view, embedding, "return the whole sequence", "vocab_reduce_scatter")
    for name in _find_stream_norms(view, styles, embedding):
        if not _accepts_slices(styles.get(name)):
            raise _build_missing_entry_error(view, name, "take its slice for the whole sequence", "activation")
    if embedding is not None:
        _check_outputs_scattered(view, styles)
    if head is not None and not _expects_slices(head, embedding, styles):
        raise _build_missing_entry_error(view, head, "take its slice for the whole sequence", "colwise_gather_output")


def find_scattering_embedding(view: PlanView) -> str | None:
    """Return the name of the model's input embedding if its entry makes it return slices of the sequence."""
    name = _find_module_name(view, "get_input_embeddings")
    return name if name is not None and _returns_slices(view.find_module_style(name)) else None


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalizes each token by itself: named so, with one-dimensional parameters only."""
    named = "norm" in type(module).__name__.lower()
    return named and all(parameter.ndim == 1 for parameter in module.parameters())


def _check_no_sequence_slices(view: PlanView, styles: ModuleStyles) -> None:
    """Check that no single module of a model whose stream is whole works on slices of the sequence."""
    for name, style in styles.items() if view.is_whole_model else ():
        if style.takes in ("sequence", "sequence at 2"):
            raise PlanError(
                f"{name} would return a slice of the sequence, where the plan's layers return the whole of it",
                hint="remove its entry, or choose a sequence parallel plan, Plan.from_model(model, 'sp')",
                module=name,
                style=style.name,
            )


def _find_stream_norms(view: PlanView, styles: ModuleStyles, embedding: str | None) -> Iterator[str]:
    """Yield the norms that stand in the stream: beside the embedding, or beside modules that gather the sequence."""
    owners = {_get_parent_name(name) for name, style in styles.items() if _gathers(style) or _gathers_and_splits(style)}
    owners |= {_get_parent_name(embedding)} if embedding is not None else set()
    for name, module in view.modules.items():
        has_parameters = next(module.parameters(), None) is not None
        if _get_parent_name(name) in owners and is_norm(module) and has_parameters:
            yield name


def _check_outputs_scattered(view: PlanView, styles: ModuleStyles) -> None:
    """Check that no part of a layer gathers the sequence and returns the whole of it to a stream of slices."""
    for name, style in styles.items():
        below = {other: its_style for other, its_style in styles.items() if other.startswith(f"{name}.")}
        if not _gathers(style) or any(map(_returns_slices, below.values())):
            continue
        parent = _get_parent_name(name)
        if not any(_get_parent_name(other) == parent and _preserves_slices(styles[other]) for other in styles):
            continue
        last = next((other for other, its_style in below.items() if its_style.takes == "features"), None)
        if last is None:
            raise _build_missing_entry_error(view, name, "return the whole sequence", "module_allgather_split")
        raise _build_missing_entry_error(view, last, "return the whole sequence", "rowwise_reduce_scatter")


def _expects_slices(head: str, embedding: str | None, styles: ModuleStyles) -> bool:
    """Return whether a head gathers its input, or a module beside the embedding has gathered it before."""
    style = styles.get(head)
    if style is not None and style.around is not None:
        return style.takes == "gathered" and style.gives != "sequence"
    if embedding is None:
        return False
    parent = _get_parent_name(embedding)
    return any(_get_parent_name(name) == parent and _gathers(style) for name, style in styles.items())


def _gathers(style: ParallelStyle) -> bool:
    return style.takes == "gathered" and style.gives == "any"


def _gathers_and_splits(style: ParallelStyle) -> bool:
    return style.takes == "gathered" and style.gives == "sequence"


def _returns_slices(style: ParallelStyle | None) -> bool:
    return style is not None and style.gives == "sequence"


def _preserves_slices(style: ParallelStyle) -> bool:
    return style.takes == style.gives == "sequence"


def _accepts_slices(style: ParallelStyle | None) -> bool:
    return style is not None and (_gathers(style) or _returns_slices(style))


def _get_module_styles(view: PlanView) -> ModuleStyles:
    styles = {name: view.find_module_style(name) for name in view.module_keys}
    return {name: style for name, style in styles.items() if style is not None}


def _find_module_name(view: PlanView, getter: str) -> str | None:
    """Return the name of the module that a model's getter returns, None if it returns none."""
    try:
        module = getattr(view.model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, other in view.modules.items() if other is module), None)


def _get_parent_name(name: str) -> str:
    return name.rpartition(".")[0]


def _build_missing_entry_error(view: PlanView, name: str, consequence: str, style: str) -> PlanError:
    return PlanError(
        f"{name} would {consequence}, where the plan's layers return slices of it",
        hint=f"add the entry {choose_key(view.plan, name)!r}: {style!r}, or choose a mode without sequence parallelism",
        module=name,
        style=style,
    )
