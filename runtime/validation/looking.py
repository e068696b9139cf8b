"""The parts of a validation in their order, each as far as those before it leave it a meaning."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from plans.errors import PlanError
from runtime.checkpoint.content import Content
from runtime.checkpoint.record import Manifest
from runtime.models.dtypes import DTYPES
from runtime.processes.agreement import gather_json, together
from runtime.styles import StyleRegistry
from runtime.validation.attempt import Failed
from runtime.validation.backward import check_backward
from runtime.validation.content import check_content
from runtime.validation.findings import Findings
from runtime.validation.forward import AsStored, as_stored, check_comparable, check_forward, expected_output, outputs
from runtime.validation.generation import check_generation
from runtime.validation.model import (
    Parallel,
    check_loaded,
    check_structure,
    loaded,
    made_parallel,
    refuted_plan,
)
from runtime.validation.outputs import tokens_of
from runtime.validation.reference import Reference, load_reference
from runtime.validation.request import ValidationRequest
from runtime.validation.room import give_back, has_room
from runtime.validation.same_as_reference import compare_configs, compare_record, compare_tensors
from runtime.validation.source import stored_dtypes
from runtime.validation.values import PARTS, Check

__all__ = ["look"]

_EXACT = torch.float32
_STORED = "forward as stored"


def look(
    request: ValidationRequest, styles: StyleRegistry, manifest: Manifest | None, content: Content, findings: Findings
) -> None:
    """Look at everything in order; every rank calls this.

    Args:
        request: what to validate.
        styles: those that may run.
        manifest: of the checkpoint, where it has one.
        content: of the checkpoint.
        findings: that are added to.

    Raises:
        MigratorError: the work could not be done, or the files contradict one another; on every rank alike.
    """
    dtypes = stored_dtypes(content)
    own = DTYPES[dtypes[0]] if len(dtypes) == 1 else _EXACT
    with findings.timed("structure"):
        parallel = _parallel(request, styles, manifest, own, findings)
    if parallel is None or not findings.checks["structure"].ok:
        findings.skip("the structure is wrong", *PARTS[1:])
        return
    with findings.timed("loading"):
        loaded(parallel, content, findings.device, None)
    with findings.timed("structure"):
        findings.add("structure", _structure(request, parallel, content))
    with findings.timed("content"):
        findings.add("content", check_content(parallel.model, parallel.resolved, content))
    if dtypes == ["F32"]:
        _compute(request, parallel, content, None, findings)
        return
    stored = _as_stored(request, parallel, dtypes, findings)
    del parallel  # so that the next one has its memory
    give_back(findings.device)
    with findings.timed("loading"):
        exact = made_parallel(request, _EXACT, findings.device, styles)
        loaded(exact, content, findings.device, _EXACT)
    _compute(request, exact, content, stored, findings)


def _parallel(
    request: ValidationRequest,
    styles: StyleRegistry,
    manifest: Manifest | None,
    dtype: torch.dtype,
    findings: Findings,
) -> Parallel | None:
    """Make the model parallel; a checkpoint that was laid out by a plan must have one that can be applied."""
    try:
        parallel = made_parallel(request, dtype, findings.device, styles)
    except PlanError as error:
        if manifest is None:
            raise
        findings.add("structure", refuted_plan(error))
        return None
    findings.add("structure", check_structure(parallel, manifest))
    return parallel


def _structure(request: ValidationRequest, parallel: Parallel, content: Content) -> Check:
    """Hold the loaded model against its plan, and its config against the recorded one and the reference's."""
    found, reference = check_loaded(parallel, content), request.reference
    changed = together(lambda: compare_record(content))
    unlike = together(lambda: compare_configs(request.folder, reference)) if reference else []
    return replace(found, mismatches=(*found.mismatches, *changed, *unlike))


def _as_stored(
    request: ValidationRequest, parallel: Parallel, dtypes: list[str], findings: Findings
) -> AsStored | None:
    """Run both models with weights of the checkpoint's own type."""
    if len(dtypes) != 1:
        findings.skip(f"parameters are stored as {', '.join(dtypes)}", _STORED)
        return None
    with findings.timed("loading"):
        reference = _reference(request, parallel, DTYPES[dtypes[0]], findings)
    with findings.timed("forward"):
        found = as_stored(parallel.model, reference, tokens_of(parallel.model, request), dtypes[0])
    if isinstance(found, str):
        findings.skip(found, _STORED)
        return None
    return found


def _compute(
    request: ValidationRequest, parallel: Parallel, content: Content, stored: AsStored | None, findings: Findings
) -> None:
    """Compare what the model computes in float32."""
    model, source = parallel.model, request.reference or request.folder
    with findings.timed("loading"):
        reference = _reference(request, parallel, _EXACT, findings)
    if request.reference is not None:
        with findings.timed("content"):
            findings.add("content", compare_tensors(findings.checks["content"], content, request.reference))
    tokens = tokens_of(model, request)
    with findings.timed("forward"):
        expected = expected_output(reference, tokens, source)
        found = outputs(model, tokens)
        if not isinstance(found, Failed):
            check_comparable(found, expected, source)
        findings.add("forward", check_forward(found, expected.tensor, request.tolerance, reference.words, stored))
    if isinstance(found, Failed):
        findings.skip("the forward failed", *PARTS[3:])
        return
    with findings.timed("backward"):
        findings.add("backward", check_backward(model, parallel.resolved, tokens, reference, request))
    with findings.timed("generation"):
        findings.add("generation", check_generation(model, tokens, reference, request))


def _reference(request: ValidationRequest, parallel: Parallel, dtype: torch.dtype, findings: Findings) -> Reference:
    """Load the reference: whole on rank 0 where it has room there, else spread over the ranks."""
    fits: bool = gather_json(has_room(parallel.model, findings.device))[0]
    spread = not fits and dist.get_world_size() > 1
    return load_reference(request.reference or request.folder, dtype, findings.device, spread=spread)
