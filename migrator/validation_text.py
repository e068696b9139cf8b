"""What `migrator validate` says to a person."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator import console
from runtime.wording import pluralize

if TYPE_CHECKING:
    from runtime.parallel.mismatch import Mismatch
    from runtime.validation.request import ValidationRequest
    from runtime.validation.values import CheckResult, ValidationResult

__all__ = ["explain_failure", "show_result"]

_MAX_MISMATCHES = 20
"""Mismatches of one part that are printed; JSON and the report have all of them."""


def show_result(source: Path, result: ValidationResult) -> None:
    """Print each part with its numbers, what is wrong with it, and what was skipped."""
    for part, check in result.checks.items():
        said = _DESCRIPTIONS[part](check, result.world_size)
        console.emit_line(f"{part:<10} {'ok' if check.ok else 'WRONG':<8} {said}".rstrip())
        for mismatch in check.mismatches[:_MAX_MISMATCHES]:
            _show_mismatch(mismatch)
        if len(check.mismatches) > _MAX_MISMATCHES:
            console.emit_line(f"{'':<10} and {len(check.mismatches) - _MAX_MISMATCHES} more")
    for part, reason in result.skipped.items():
        console.emit_line(f"{part:<10} skipped  {reason}")
    console.emit_line(f"{source}: {'proven' if result.ok else 'not as it must be'}")


def explain_failure(request: ValidationRequest, result: ValidationResult) -> str | None:
    """Return what else may explain a failure, None where there is nothing to say."""
    forward, content = result.checks.get("forward"), result.checks.get("content")
    if (
        request.reference
        and forward
        and forward.checked
        and not forward.ok
        and content
        and _differs_only_from_reference(content)
    ):
        return f"{request.reference} may be another checkpoint than the one that was laid out"
    return None


def _show_mismatch(mismatch: Mismatch) -> None:
    where = "" if mismatch.rank is None else f" on rank {mismatch.rank}"
    console.emit_line(f"{'':<10} {mismatch.name}{where}: expected {mismatch.expected}, found {mismatch.found}")


def _describe_structure(check: CheckResult, world_size: int) -> str:
    ranks = "1 rank" if world_size == 1 else f"each of {world_size} ranks"
    text, numbers = f"{pluralize(check.checked, 'tensor')} on {ranks}", check.numbers
    if "sharded" not in numbers:
        return text
    return f"{text}, {numbers['sharded']} of them sharded, {max(numbers['bytes_per_rank']):,} bytes at most"


def _describe_content(check: CheckResult, world_size: int) -> str:
    numbers = check.numbers
    if "copies" not in numbers:
        return ""
    copies = f"{numbers['copies']} {'copy' if numbers['copies'] == 1 else 'copies'}"
    text = f"{pluralize(check.checked, 'tensor')} in {copies}, by the {numbers['against']}'s digests"
    compared = numbers.get("with_reference", {}).get("compared", check.checked)
    return text if compared >= check.checked else f"{text}; {compared} stored as in the reference, and compared with it"


def _differs_only_from_reference(content: CheckResult) -> bool:
    """Say whether all that differs is between the checkpoint and its reference."""
    different: int = content.numbers.get("with_reference", {}).get("different", 0)
    return len(content.mismatches) == different


def _describe_forward(check: CheckResult, world_size: int) -> str:
    numbers = check.numbers
    if "reason" in numbers:
        return str(numbers["reason"])
    text = f"largest difference of {numbers['compared']} {_format_difference(numbers)}"
    return f"{text}; {_describe_stored_dtype(numbers['as_stored'])}" if "as_stored" in numbers else text


def _describe_stored_dtype(numbers: Mapping[str, Any]) -> str:
    if "typical_error" not in numbers:
        return f"in {numbers['dtype']} it fails"
    errors = (_format_number(numbers[name]) for name in ("typical_error", "unsharded_error"))
    return "in {} {} off, the unsharded {}".format(numbers["dtype"], *errors)


def _describe_backward(check: CheckResult, world_size: int) -> str:
    numbers = check.numbers
    if "reason" in numbers:
        return str(numbers["reason"])
    return f"{pluralize(check.checked, 'gradient')}, largest difference {_format_number(numbers['worst_relative_diff'])} of one"


def _describe_generation(check: CheckResult, world_size: int) -> str:
    numbers = check.numbers
    if "reason" in numbers:
        return str(numbers["reason"])
    return f"{pluralize(numbers['texts'], 'text')} of {pluralize(numbers['tokens_each'], 'token')}"


_DESCRIPTIONS: Mapping[str, Callable[[CheckResult, int], str]] = {
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
