"""Tensors that seem to be missing: what is stored, and the reading of its names by which most of them are there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from plans.errors import CheckpointError, IncompleteError
from plans.text import format_names

__all__ = ["build_missing_error", "check_distinct", "strip_wrappers"]

_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module"
    r"|base_model\.model|base_layer)\."
)
"""What torch.compile, FSDP, activation checkpointing, DDP, DeepSpeed, Lightning and PEFT put into names."""

_BARE_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
"""Those around a module that changes nothing: without the ones of PEFT, beside which an adapter is stored."""

_ADAPTER = re.compile(r"(?:.*\.)?(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\..*")
_OPTIMIZER = re.compile(r"(?:.*\.)?(?:exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|param_groups)(?:\..*)?")
_MISSING = "save the tensors that are missing too, or correct config.json"
_COMPLETE = "the checkpoint is incomplete, or config.json belongs to another model"


@dataclass(frozen=True)
class _Reading:
    """A way to read stored names as the model's.

    Args:
        found: the model's tensors that are there by this reading.
        what: the reading in words.
        hint: the next step if it is the right one.
    """

    found: frozenset[str]
    what: str
    hint: str


def strip_wrappers(name: str) -> str:
    """Return a stored name without what compilation and parallel wrappers put into it, wherever that stands."""
    return _BARE_WRAPPERS.sub("", name)


def check_distinct(folder: Path, names: Iterable[str]) -> None:
    """Refuse names that wrappers alone distinguish, because nothing tells which of the tensors is meant.

    Args:
        folder: the checkpoint's folder.
        names: the stored names.

    Raises:
        CheckpointError: two names are equal without their wrappers.
    """
    known: dict[str, str] = {}
    for name in names:
        if (other := known.setdefault(strip_wrappers(name), name)) != name:
            raise CheckpointError(
                f"{folder}: {other!r} and {name!r} are one tensor's names without their wrappers",
                hint="save the model that you want alone",
                names=[other, name],
            )


def build_missing_error(
    folder: Path,
    missing: Collection[str],
    expected: Collection[str],
    stored: Collection[str],
    find_by_hub_names: Callable[[], Collection[str]] | None = None,
    note: str = "",
) -> IncompleteError:
    """Return the error for tensors of a model that are not stored, with what is stored and the nearest reading of it.

    Args:
        folder: the checkpoint's folder.
        missing: the tensors that were looked for in vain.
        expected: all tensors that were looked for.
        stored: the names that are stored.
        find_by_hub_names: returns the model's tensors that are stored under names of its hub form; None if such names
            were looked for.
        note: what else is known, appended to the message.
    """
    names = format_names(list(missing))
    some = f"stored are {format_names(_choose_unknown(expected, stored))}" if stored else "nothing is stored"
    direct = frozenset(expected) & frozenset(stored)
    readings = [*_read_optimizer(stored), *_read_names(expected, stored)]
    if find_by_hub_names is not None and not any(len(reading.found) == len(expected) for reading in readings):
        readings += _read_hub_names(frozenset(find_by_hub_names()) & frozenset(expected))
    best = max(readings, key=lambda reading: len(reading.found), default=None)
    message = f"{folder}: the model's {names} {'is' if len(missing) == 1 else 'are'} not stored; {some}"
    hint = _COMPLETE
    if best is not None and (len(best.found) > len(direct) or not direct):
        absent = [name for name in expected if name not in best.found]
        message, hint = f"{message}; {best.what}{_describe_absent(best, absent)}", best.hint
    return IncompleteError(
        message + (f"; {note}" if note else ""), hint=hint, missing=list(missing), stored=sorted(stored)[:100]
    )


def _choose_unknown(expected: Collection[str], stored: Collection[str]) -> list[str]:
    """Return the stored names, those first that the model does not have."""
    known = frozenset(expected)
    return sorted(stored, key=lambda name: name in known)


def _describe_absent(reading: _Reading, absent: list[str]) -> str:
    if not reading.found:
        return ""
    total = len(reading.found) + len(absent)
    return f", {len(reading.found)} of {total} are there" + (f", all but {format_names(absent)}" if absent else "")


def _read_optimizer(stored: Collection[str]) -> list[_Reading]:
    if not stored or not all(map(_OPTIMIZER.fullmatch, stored)):
        return []
    hint = "name the folder that has the model's weights; the optimizer's state goes along if it is in or below it"
    return [_Reading(frozenset(), "this is the state of an optimizer", hint)]


def _read_names(expected: Collection[str], stored: Collection[str]) -> list[_Reading]:
    known = frozenset(expected)
    bare = {_WRAPPERS.sub("", name): name for name in stored}
    readings = []
    wrapped = [name for name in bare if name in known and bare[name] != name]
    infixes = sorted({infix for name in stored for infix in _WRAPPERS.findall(name)})
    infix = format_names(infixes)
    adapter = [name for name in stored if _ADAPTER.fullmatch(name)]
    if wrapped and adapter:
        found = frozenset(name for name in bare if name in known)
        hint = "merge the adapter before saving: `model = model.merge_and_unload()`"
        return [_Reading(found, f"beside a PEFT adapter, {len(adapter)} tensors such as {adapter[0]!r}", hint)]
    save = "save it without its wrappers: `get_model_state_dict` of torch.distributed.checkpoint.state_dict does so"
    if wrapped:
        found = frozenset(name for name in bare if name in known)
        hint = save if len(found) == len(known) else _MISSING
        readings.append(_Reading(found, f"without {infix} in the stored names", hint))
    longer = Counter(prefix for name in bare for prefix in _iter_prefixes(name, known))
    if longer:
        prefix = max(longer, key=lambda text: longer[text])
        found = frozenset(name.removeprefix(prefix) for name in bare if name.startswith(prefix)) & known
        also = (
            f", and without {infix}" if infixes and any(bare[prefix + name] != prefix + name for name in found) else ""
        )
        hint = save if also and len(found) == len(known) else _MISSING
        readings.append(_Reading(found, f"under the prefix {prefix!r}{also}", hint))
    shorter = Counter(prefix for name in known for prefix in _iter_prefixes(name, frozenset(bare)))
    if shorter:
        prefix = max(shorter, key=lambda text: shorter[text])
        found = frozenset(prefix + name for name in bare) & known
        hint = f"the model seems to be saved without what is around its {prefix!r}; save the whole model, or set "
        readings.append(_Reading(found, f"with {prefix!r} before the stored names", hint + "`architectures`"))
    return readings


def _iter_prefixes(name: str, known: Collection[str]) -> list[str]:
    """Return the prefixes, with their last dot, after which a name is a known one."""
    ends = [index + 1 for index, character in enumerate(name) if character == "."]
    return [name[:end] for end in ends if name[end:] in known]


def _read_hub_names(found: Collection[str]) -> list[_Reading]:
    if not found:
        return []
    hint = "a distributed checkpoint has the names of the model's parameters; save the hub form with save_pretrained"
    return [_Reading(frozenset(found), "as names of the hub form", hint)]
