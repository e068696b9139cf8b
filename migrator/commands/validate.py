"""`migrator validate`: a checkpoint in any layout, proven on a real mesh."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator.actions import validate
from migrator.exit_codes import of_validation
from migrator.options.common import (
    SECONDS,
    digests_option,
    follow_links_option,
    format_option,
    mesh_options,
    reject_empty,
    reject_empty_patterns,
    report_option,
    require_runtime,
)
from migrator.settings import Validate
from migrator.terminal import console
from plans.plan import to_wildcard
from plans.text import format_numbers, matches, pluralize
from runtime.processes.started import exit_now, is_worker_process

if TYPE_CHECKING:
    from migrator.settings import Device, Ranks
    from plans.mesh import Mode
    from runtime.parallel.mismatch import Mismatch
    from runtime.validation.request import ValidationRequest
    from runtime.validation.results import CheckResult, ValidationResult

__all__ = ["command", "explain_failure", "show_result"]


@click.command("validate")
@click.argument("source", callback=reject_empty)
@mesh_options
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "auto"]),
    default=Validate.device,
    show_default=True,
    help="Where ranks compute; auto takes GPUs if each rank can have one.",
)
@click.option(
    "--ranks",
    type=click.Choice(["auto", "processes", "threads"]),
    default=Validate.ranks,
    show_default=True,
    help="What ranks are; auto takes processes where each can have a processor, or a GPU, and threads elsewhere.",
)
@click.option(
    "--reference",
    callback=reject_empty,
    help="The checkpoint that SOURCE was made from; without it, the unsharded model is assembled from SOURCE.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=Validate.tolerance,
    help="Accepted difference of outputs and gradients, relative to the largest; by default 1e-10. Models that do not "
    "fit in memory in float64 are compared in float32, by default at 1e-5, their gradients at ten times that.",
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON or TOML file, key to style, to use instead of the model's own plan.",
)
@click.option(
    "--allow-unexercised",
    "allow_unexercised",
    multiple=True,
    metavar="PATTERN",
    callback=reject_empty_patterns,
    help="Call SOURCE proven although tensors with this name were not exercised; * matches anything. Repeatable.",
)
@click.option(
    "--timeout",
    type=SECONDS,
    default=Validate.timeout,
    show_default=True,
    metavar="SECONDS",
    help="How long the workers may take.",
)
@click.option(
    "--by-block",
    is_flag=True,
    help="Compare the models block by block, with the memory of two blocks; done by itself where both do not fit.",
)
@digests_option
@follow_links_option
@format_option("human", "json")
@report_option
def command(
    source: str,
    mode: Mode | None,
    device: Device,
    ranks: Ranks,
    reference: str | None,
    tolerance: float | None,
    plan: Path | None,
    allow_unexercised: tuple[str, ...],
    timeout: float,
    by_block: bool,
    digests: Path | None,
    follow_links: bool,
    output_format: str,
    report: Path | None,
    **sizes: int,
) -> int:
    """Prove a checkpoint by running its model on a real mesh.

    Each rank, a process or a thread, loads its part of SOURCE and runs the model. Every planned parameter must be
    sharded as planned, and every other one must be whole. The ranks' bytes must equal those that were written and
    those of the reference, config.json must describe the same computation as the reference's, and outputs,
    gradients and greedily generated tokens must equal the unsharded model's; each data parallel rank has a batch of
    its own. What no gradient reached is listed, and SOURCE is then not fully proven. The mesh is the one that
    SOURCE was laid out for, if it records one. Exit code 1 means that something differs or was not exercised, 2
    that the model or the runtime failed. Also runs under torchrun, on several machines that can all access SOURCE.
    SOURCE and the reference are folders in any layout, hf://owner/name[@revision] or s3://bucket/folder.
    """
    require_runtime()
    is_worker = is_worker_process()
    if not is_worker:
        # Handled like Ctrl-C, which stops the workers and removes temporary folders; the default would leave both.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = Validate(
        source=source, reference=reference, **_read_explicit_sizes(sizes), mode=mode, device=device,
        tolerance=tolerance, timeout=timeout, plan=plan, allow_unexercised=allow_unexercised, ranks=ranks,
        follow_links=follow_links, by_block=by_block, digests=digests,
    )  # fmt: skip
    validation = validate(settings, quiet=False)
    if os.environ.get("RANK", "0") == "0":
        _show_and_save(validation.request, validation.result, output_format, report)
    code = of_validation(validation.result)
    if is_worker:
        exit_now(code)
    return code


def _read_explicit_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """Return the sizes that the user gave, without defaults."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {axis: size for axis, size in sizes.items() if context.get_parameter_source(axis) != default}


def _show_and_save(
    request: ValidationRequest, result: ValidationResult, output_format: str, report: Path | None
) -> None:
    if output_format == "json":
        console.emit_json(result.to_json())
    else:
        show_result(request.folder, result)
    if (text := explain_failure(request, result)) is not None:
        console.say(f"hint: {text}")
    for pattern in request.allow_unexercised:
        if not any(matches(pattern, row.name) for row in result.unexercised):
            console.say(f"--allow-unexercised {pattern}: nothing with this name was left unexercised")
    if report is not None:
        from migrator.report.from_validation import report_validation
        from migrator.report.page import write_report

        write_report(report_validation(request, result), report)
        console.say(f"wrote {report}")


_MAX_MISMATCHES = 20
"""Mismatches of one check that are printed; JSON and the report have all of them."""


def show_result(source: Path, result: ValidationResult) -> None:
    """Print each check with its numbers and mismatches, and the checks that were skipped."""
    for part, check in result.checks.items():
        description = _DESCRIPTIONS[part](check, result)
        console.emit_line(f"{part:<10} {'ok' if check.ok else 'WRONG':<8} {description}".rstrip())
        for mismatch in check.mismatches[:_MAX_MISMATCHES]:
            _show_mismatch(mismatch)
        if len(check.mismatches) > _MAX_MISMATCHES:
            console.emit_line(f"{'':<10} and {len(check.mismatches) - _MAX_MISMATCHES} more")
    for part, reason in result.failed.items():
        console.emit_line(f"{part:<10} FAILED   {reason}")
    for part, reason in result.skipped.items():
        console.emit_line(f"{part:<10} skipped  {reason}")
    _show_unexercised(result)
    console.emit_line(f"{source}: {result.verdict}{', block by block' if result.by_block else ''}")


def _show_unexercised(result: ValidationResult) -> None:
    """Print what was not exercised, a line for each group of tensors of the same name in different layers."""
    groups = Counter((to_wildcard(row.name), row.reason, row.ranks, row.allowed) for row in result.unexercised)
    lines = [
        f"{name}{f' ×{count}' if count > 1 else ''}{_format_ranks(ranks)}: {reason}{' (allowed)' if allowed else ''}"
        for (name, reason, ranks, allowed), count in groups.items()
    ]
    if lines:
        is_allowed = all(row.allowed for row in result.unexercised)
        total = pluralize(len(result.unexercised), "name")
        console.emit_line(f"{'exercise':<10} {'allowed' if is_allowed else 'PARTLY':<8} {total} not exercised")
    for line in lines[:_MAX_MISMATCHES]:
        console.emit_line(f"{'':<10} {line}")
    if len(lines) > _MAX_MISMATCHES:
        console.emit_line(f"{'':<10} and {len(lines) - _MAX_MISMATCHES} more")


def _format_ranks(ranks: Sequence[int]) -> str:
    return f" on rank {format_numbers(ranks)}" if ranks else ""


def explain_failure(request: ValidationRequest, result: ValidationResult) -> str | None:
    """Return another explanation for a failure, None if there is none."""
    forward, content = result.checks.get("forward"), result.checks.get("content")
    if (
        request.reference
        and forward
        and forward.checked
        and not forward.ok
        and content
        and _differs_only_from_reference(content)
    ):
        return f"{request.reference} may not be the checkpoint that {request.folder} was made from"
    if result.failed:
        return "the model did not run under its plan, which says nothing about the checkpoint's content"
    if result.verdict == "not fully proven":
        return "--allow-unexercised PATTERN accepts by name what need not be exercised"
    return None


def _show_mismatch(mismatch: Mismatch) -> None:
    where = "" if mismatch.rank is None else f" on rank {mismatch.rank}"
    console.emit_line(f"{'':<10} {mismatch.name}{where}: expected {mismatch.expected}, found {mismatch.found}")


def _describe_structure(check: CheckResult, result: ValidationResult) -> str:
    ranks, numbers = "1 rank" if result.world_size == 1 else f"each of {result.world_size} ranks", check.numbers
    if "stages" in numbers:
        ranks = f"{result.world_size} ranks in {numbers['stages']} stages"
    ranks += " (threads)" if result.ranks == "threads" else ""
    text = f"{pluralize(check.checked, 'tensor')} on {ranks}"
    if "sharded" not in numbers:
        return text
    return f"{text}, {numbers['sharded']} of them sharded, {max(numbers['bytes_per_rank']):,} bytes at most"


def _describe_content(check: CheckResult, result: ValidationResult) -> str:
    numbers = check.numbers
    if "copies" not in numbers:
        return ""
    copies = f"{numbers['copies']} {'copy' if numbers['copies'] == 1 else 'copies'}"
    text = f"{pluralize(check.checked, 'tensor')} in {copies}, by the {numbers['against']}'s digests"
    compared = numbers.get("with_reference", {}).get("compared", check.checked)
    return text if compared >= check.checked else f"{text}; {compared} stored as in the reference, and compared with it"


def _differs_only_from_reference(content: CheckResult) -> bool:
    """Return whether all mismatches are between the checkpoint and its reference."""
    different: int = content.numbers.get("with_reference", {}).get("different", 0)
    return len(content.mismatches) == different


def _describe_forward(check: CheckResult, result: ValidationResult) -> str:
    numbers = check.numbers
    if "reason" in numbers:
        return str(numbers["reason"])
    text = f"largest difference of {numbers['compared']} in {numbers['precision']} {_format_difference(numbers)}"
    if result.by_block:
        tied = numbers["tied_tokens"]
        ties = f"; ties decided the experts of {pluralize(tied, 'token')}" if tied else ""
        return f"{pluralize(numbers['blocks'], 'block')}, each on the unsharded inputs, {text}{ties}"
    text = f"{text}; {_describe_stored_dtype(numbers['as_stored'])}" if "as_stored" in numbers else text
    if "dequantized_from" in numbers:
        text = f"{text}, on weights dequantized from {numbers['dequantized_from']}"
    reading = str(numbers.get("reference_read_by", "transformers"))
    return text if reading == "transformers" else f"{text}; the reference was read by {reading}"


def _describe_stored_dtype(numbers: Mapping[str, Any]) -> str:
    if "typical_error" not in numbers:
        return f"in {numbers['dtype']} it fails"
    errors = (_format_number(numbers[name]) for name in ("typical_error", "unsharded_error"))
    return "in {} {} off, the unsharded {}".format(numbers["dtype"], *errors)


def _describe_backward(check: CheckResult, result: ValidationResult) -> str:
    numbers = check.numbers
    if "reason" in numbers:
        return str(numbers["reason"])
    worst = _format_number(numbers["worst_relative_diff"])
    of_inputs = f" and those of {pluralize(numbers['input_gradients'], 'input')}" if result.by_block else ""
    text = f"{pluralize(check.checked, 'gradient')}{of_inputs} in {numbers['precision']}"
    text = f"{text}, largest difference {worst} of one"
    batches = f" over {numbers['batches']} batches" if numbers["batches"] > 1 else ""
    inputs = f", {pluralize(numbers['inputs'], 'input')}" if numbers["inputs"] > 1 else ""
    forced = ", the last with routing forced alike on both sides" if numbers["forced_routing"] else ""
    return f"{text}{batches}{inputs}{forced}"


def _describe_generation(check: CheckResult, result: ValidationResult) -> str:
    numbers = check.numbers
    if "reason" in numbers:
        return str(numbers["reason"])
    return f"{pluralize(numbers['texts'], 'text')} of {pluralize(numbers['tokens_each'], 'token')}"


_DESCRIPTIONS: Mapping[str, Callable[[CheckResult, ValidationResult], str]] = {
    "structure": _describe_structure,
    "content": _describe_content,
    "forward": _describe_forward,
    "backward": _describe_backward,
    "generation": _describe_generation,
}


def _format_difference(numbers: Mapping[str, Any]) -> str:
    return f"{_format_number(numbers['max_abs_diff'])}, of {_format_number(numbers['max_abs_reference'])}"


def _format_number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2e}"
