"""Names are renamed as transformers renames them one by one, whatever their numbers are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion

from runtime.checkpoint.hub import renaming
from runtime.checkpoint.hub.renaming import NameRenamer
from runtime.models.model import meta_model
from tests.tiny_models import MODELS, tiny_config


def entries(model: Any) -> tuple[list[Any], list[Any]]:
    mapping = get_model_conversion_mapping(model)
    return (
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
    )


def stored_names(model: Any) -> list[str]:
    """Return the names in the model, those that transformers saves, and both with other numbers and prefixes."""
    names = set(model.state_dict())
    names |= set(revert_weight_conversion(model, model.state_dict()))
    prefix = f"{model.base_model_prefix}."
    names |= {name.removeprefix(prefix) for name in names} | {prefix + name for name in names}
    grown = {re.sub(r"\d+", lambda number: str(int(number[0]) + 10), name) for name in names}
    return sorted(names | grown | {re.sub(r"\.\d+\.", ".", name) for name in names} | {"1.2.3", "layers.0", ""})


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_name_is_renamed_as_transformers_does(name: str) -> None:
    model = meta_model(tiny_config(name))
    renamings, converters = entries(model)
    expected = model.state_dict()
    renamer = NameRenamer(renamings, converters, model.base_model_prefix, expected)
    for stored in stored_names(model):
        alone = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
        assert renamer.rename(stored) == alone, stored


def test_forms_are_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts and layers that differ in numbers only are one question to transformers."""
    model = meta_model(tiny_config("qwen3_moe"))
    renamings, converters = entries(model)
    asked: list[str] = []

    def count(name: str, *arguments: Any) -> tuple[str, str | None]:
        asked.append(name)
        return rename_source_key(name, *arguments)

    monkeypatch.setattr(renaming, "rename_source_key", count)
    renamer = NameRenamer(renamings, converters, model.base_model_prefix, model.state_dict())
    names = revert_weight_conversion(model, model.state_dict())
    assert [renamer.rename(name)[0] in model.state_dict() for name in names] == [True] * len(names)
    assert len(asked) == len({re.sub(r"\d+", "#", name) for name in names}) < len(names)


PATTERNS = [
    r"layers\.(\d+)\.a",
    r"layers.0.b",
    r"w1",
    r"experts\.\d\.",
    r"x[12]",
    r"layers\.\d{2}\.c",
    r"^a\.(.+)",
    "b",
]
TARGETS = [r"blocks.\1.a", "blocks.0.b", "w2", "e", r"m.\1", "d"]
PARTS = ["layers", "0", "7", "12", "a", "b", "c", "w1", "w3", "experts", "x1", "blocks", "m", "90000000", "900000001"]


@settings(max_examples=60)
@given(data=st.data())
def test_entries_that_tell_numbers_apart_are_obeyed(data: st.DataObject) -> None:
    """Random patterns, some for particular numbers, on random names, some of which look like marks."""
    dotted = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join)
    names = data.draw(st.lists(dotted, min_size=1, max_size=12))
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(PATTERNS), st.sampled_from(TARGETS)), max_size=3))
    renamings = [WeightRenaming(source, target) for source, target in pairs if "(" in source or r"\1" not in target]
    expected = dict.fromkeys(data.draw(st.lists(st.one_of(dotted, st.sampled_from(names)), max_size=12)), True)
    prefix = data.draw(st.sampled_from(["m", "layers", "0"]))
    renamer = NameRenamer(renamings, [], prefix, expected)
    for name in names:
        assert renamer.rename(name) == rename_source_key(name, renamings, [], prefix, expected), name


def test_kinds_that_count_are_asked_about_each_name() -> None:
    kind = getattr(transformers.core_model_loading, "Inkling2IndexOffsetWeightRename", None)
    if kind is None:
        pytest.skip("this transformers has no entry that counts")
    entry = kind(r"queries\.(\d+)", r"layers.\1.q", 1)
    expected = {f"layers.{number}.q.x": True for number in range(30)}
    renamer = NameRenamer([entry], [], "model", expected)
    assert [renamer.rename(f"queries.{number}.x")[0] for number in range(12)] == [
        f"layers.{number + 1}.q.x" for number in range(12)
    ]
