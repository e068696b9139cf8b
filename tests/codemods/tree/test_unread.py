"""Every mention of a plan accounted for: read, or named as unread."""

from __future__ import annotations

from pathlib import Path

import pytest

from codemods.checking.check import check_paths
from codemods.files.sources import SourceFile, find_sources, read_source
from codemods.reading.module import Opaque
from codemods.reading.parse import read_module
from codemods.rewriting.migrate import plan_rewrites
from tests.codemods.helpers import REGULAR, check_noop, check_transformed, codes, write_tree
from tests.codemods.reading.test_code_built import LAYER_PAIR, PAIR, function, migrated

PAIRS = '[("layers.*.mlp.experts.gate_up_proj", "packed_colwise"), ("layers.*.mlp.experts.down_proj", "rowwise")]'
IN_CLASS = "class ToyConfig:\n    {}\n"


def check_read(root, text):
    """Everything in a file is read: it is rewritten, and nothing of it is left unread."""
    check_transformed(root, text, migrated(text))
    assert read_module(SourceFile(Path("x.py"), text.encode())).unresolved == ()


@pytest.mark.parametrize(
    "body",
    [
        f"extra = {{{PAIR}}}\nself.base_model_tp_plan.update(extra)",
        f"extra = {{{PAIR}}}\nself.base_model_tp_plan |= extra",
        f"extra: dict[str, str] = {{{PAIR}}}\nself.base_model_tp_plan = {{**self.base_model_tp_plan, **extra}}",
        f"plan: dict = self.base_model_tp_plan\nplan.update({{{LAYER_PAIR}}})",
        f"if (plan := self.base_model_tp_plan) is not None:\n    plan.update({{{PAIR}}})",
        f"self.base_model_tp_plan, self.other = {{{PAIR}}}, 1",
        f'setattr(self, "base_model_tp_plan", {{{PAIR}}})',
        f"self.base_model_tp_plan.update({PAIRS})",
        f"for key, style in {PAIRS}:\n    self.base_model_tp_plan[key] = style",
        f"for key, style in {{{PAIR}}}.items():\n    self.base_model_tp_plan[key] = style",
        f"self.base_model_tp_plan = {{k: v for k, v in {{{PAIR}}}.items()}}",
        f"for plan in (self.base_model_tp_plan, self.base_model_sp_plan):\n    plan.update({{{PAIR}}})",
        f"self.base_model_tp_plan = (self.base_model_tp_plan or {{}}) | {{{PAIR}}}",
        'key, other = "layers.*.mlp.experts.gate_up_proj", "layers.*.mlp.experts.down_proj"\n'
        f"self.base_model_tp_plan.update({{{PAIR}}})",
        'self.base_model_tp_plan |= dict.fromkeys(("layers.*.mlp.experts.gate_up_proj",), "packed_colwise")\n'
        'self.base_model_tp_plan |= {key: "rowwise" for key in ["layers.*.mlp.experts.down_proj"]}',
        f'self.kwargs["tp_plan"] = {{{PAIR}}}',
        f'self.kwargs = {{"tp_plan": {{{PAIR}}}}}',
        f'self.kwargs.setdefault("tp_plan", {{{PAIR}}})',
        'self.base_model_tp_plan.__setitem__("layers.*.mlp.experts.gate_up_proj", "packed_colwise")\n'
        'self.base_model_tp_plan.__ior__({"layers.*.mlp.experts.down_proj": "rowwise"})',
        f"plan = {{{PAIR}}}\nload(dict(tp_plan=plan))",
    ],
)
def test_more_forms_of_code_are_read(tmp_path, body):
    check_read(tmp_path, function(body))


@pytest.mark.parametrize(
    "text",
    [
        f"_PLAN = {{{PAIR}}}\n\n\nclass ToyConfig:\n    base_model_tp_plan = _PLAN\n",
        f"_PLAN: dict = {{{PAIR}}}\n\n\nclass ToyConfig:\n    base_model_tp_plan = dict(_PLAN)\n",
        f"_PLAN = {{{PAIR}}}\n\n\nclass ToyConfig:\n    base_model_tp_plan = _PLAN.copy()\n",
        f'_PLAN = {{{PAIR}}}\n\n\nclass ToyConfig:\n    base_model_tp_plan = {{**_PLAN, "norm": "colwise"}}\n',
        f"class ToyConfig:\n    _PLAN = {{{PAIR}}}\n    base_model_tp_plan = _PLAN\n",
        f"_PLAN = {{{PAIR}}}\n\n\n" + function("self.base_model_tp_plan.update(_PLAN)"),
        IN_CLASS.format(f"base_model_tp_plan, base_model_pp_plan = {{{PAIR}}}, {{}}"),
        IN_CLASS.format(f"base_model_tp_plan: dict = field(default_factory=lambda: {{{PAIR}}})"),
        IN_CLASS.format(f"def base_model_tp_plan(self):\n        plan = {{{PAIR}}}\n        return plan"),
        IN_CLASS.format(f"def __init__(self, tp_plan={{{PAIR}}}):\n        self._tp_plan = tp_plan"),
        f"def make():\n    class ToyConfig:\n        base_model_tp_plan = {{{PAIR}}}\n\n    return ToyConfig\n",
        f"@configured(tp_plan={{{PAIR}}})\nclass ToyConfig:\n    pass\n",
        f"PLAN = {{{PAIR}}}\nload(tp_plan=PLAN)\n",
        f"tp_plan = {{{PAIR}}}\n\n\nclass ToyConfig:\n    base_model_tp_plan = tp_plan\n",
        IN_CLASS.format(f"tp_plan = {{{PAIR}}}\n    base_model_tp_plan = dict(tp_plan)"),
        IN_CLASS.format(f"[base_model_tp_plan] = [{{{PAIR}}}]"),
    ],
)
def test_more_places_are_read(tmp_path, text):
    check_read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "line", "experts"),
    [
        (IN_CLASS.format("base_model_tp_plan = make()"), 2, False),
        (f"def make():\n    return {{{PAIR}}}\n\n\n" + IN_CLASS.format("base_model_tp_plan = make()"), 6, True),
        (f"P = {{{PAIR}}}\n" + IN_CLASS.format("base_model_tp_plan = P\n    base_model_sp_plan = P"), 3, True),
        (IN_CLASS.format('base_model_tp_plan = {**BASE, "norm": "colwise"}'), 2, False),
        (IN_CLASS.format('base_model_tp_plan = {KEY: "colwise"}'), 2, False),
        (function("self.base_model_tp_plan.update(extra)"), 5, False),
        (function("self.base_model_tp_plan[key] = 'colwise'"), 5, False),
        (function(f"add(self.base_model_tp_plan, {{{PAIR}}})"), 5, True),
        (function(f"dict.update(self.base_model_tp_plan, {{{PAIR}}})"), 5, True),
        (function(f'getattr(self, "base_model_tp_plan").update({{{PAIR}}})'), 5, True),
        (function(f'vars(self)["base_model_tp_plan"].update({{{PAIR}}})'), 5, True),
        (function(f"(self.base_model_tp_plan or {{}}).update({{{PAIR}}})"), 5, True),
        (function('self.base_model_tp_plan["experts"] = self.other["experts"] = "moe_experts_allreduce"'), 5, True),
        (function('self.base_model_tp_plan["experts"], other = "moe_experts_allreduce", 1'), 5, True),
        (f"tp_plan = {{{PAIR}}}\nprint(tp_plan)\n" + IN_CLASS.format("base_model_tp_plan = tp_plan"), 4, True),
        (f"class Other:\n    P = {{{PAIR}}}\n\n\n" + IN_CLASS.format("base_model_tp_plan = other.P"), 6, True),
        (
            f"P = {{{PAIR}}}\n\n\n" + IN_CLASS.format("def fill(self, P):\n        self.base_model_tp_plan.update(P)"),
            6,
            True,
        ),
        (function('for n in names:\n    self.base_model_tp_plan[f"layers.*.mlp.experts.{n}"] = "colwise"'), 6, True),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, line, experts):
    first, *_ = read_module(SourceFile(Path("x.py"), text.encode())).unresolved
    assert (first.class_name, first.attribute, first.line) == ("ToyConfig", "base_model_tp_plan", line)
    assert first.mentions_experts is experts
    outcome = check_noop(tmp_path, text)
    assert ("MIG204" in codes(outcome)) is experts
    found = check_paths([tmp_path], source="transformers-5.23").findings
    assert (line, "MIG204") in [(one.line, one.finding.code) for one in found]


@pytest.mark.parametrize(
    "body",
    [
        "plan = self.base_model_tp_plan\nprint(len(plan))",
        "for key, style in self.base_model_tp_plan.items():\n    print(key, style)",
        "if self.base_model_tp_plan is None or key in self.base_model_tp_plan:\n    return None",
        'return getattr(self, "base_model_tp_plan", {})',
        "self._tp_plan = dict(self.base_model_tp_plan)",
        "self._tp_plan = getattr(other, '_tp_plan', None)",
        'load(tp_plan="auto", ep_plan=ep_plan)',
        "self.base_model_tp_plan = None",
        f"assert self.base_model_tp_plan == {{{PAIR}}}",
        "'''self.base_model_tp_plan = build()'''",
    ],
)
def test_reading_a_plan_is_no_use_to_name(body):
    module = read_module(SourceFile(Path("x.py"), function(body).encode()))
    assert module.unresolved == ()
    assert not any(literal.entries for literal in module.classes["ToyConfig"].code_literals)


OBJECTS = '{"norm": SequenceParallel(), "layers.*.mlp.experts": tensor.ColwiseParallel(dim=1)}'


@pytest.mark.parametrize(
    "added",
    [
        "base_model_tp_plan.update(more)",
        "base_model_tp_plan.update(cast(dict, more))",
        "base_model_tp_plan['layers.*.mlp.experts.down_proj'] = RowwiseParallel()",
        "base_model_tp_plan |= more",
        "parallelize(model, base_model_tp_plan)",
    ],
)
def test_plans_of_objects_are_none_of_styles(tmp_path, added):
    """As torch's `parallelize_module` takes them, under a name that training stacks give them."""
    text = f"def parallelize(model, more):\n    base_model_tp_plan = {OBJECTS}\n    {added}\n    return 1\n"
    assert codes(check_noop(tmp_path, text)) == []
    assert check_paths([tmp_path], source="transformers-5.23").findings == ()
    for style in (f".update({{{PAIR}}})", f" |= {{{PAIR}}}"):
        write_tree(tmp_path, {"toy/configuration_toy.py": text.replace(added, f"base_model_tp_plan{style}")})
        assert check_paths([tmp_path], source="transformers-5.23").changes != ()
    for value in (f"{OBJECTS} if more else more", "{}", "{**more}", '{"norm": style()}', '{"norm": STYLE}'):
        write_tree(tmp_path, {"toy/configuration_toy.py": text.replace(OBJECTS, value)})
        found = check_paths([tmp_path], source="transformers-5.23").findings
        assert ("update" in added) <= ("MIG204" in [one.finding.code for one in found]), value


def test_a_name_made_anew_is_no_plan_any_more():
    body = f"other = self.base_model_ep_plan\nother = {{{PAIR}}}\nself.x = other"
    assert read_module(SourceFile(Path("x.py"), function(body).encode())).classes["ToyConfig"].code_literals == ()


def test_a_plan_that_only_takes_over_another_is_opaque():
    text = "class ToyConfig(Base):\n    base_model_tp_plan = Base.base_model_tp_plan\n"
    module = read_module(SourceFile(Path("x.py"), text.encode()))
    assert isinstance(module.classes["ToyConfig"].plans["base_model_tp_plan"], Opaque)
    assert module.unresolved == ()


def test_a_comment_keeps_an_unread_plan_quiet(tmp_path):
    text = IN_CLASS.format("base_model_tp_plan = make()  # migrator: ignore[MIG204]")
    write_tree(tmp_path, {"toy/configuration_toy.py": text, "toy/modeling_toy.py": REGULAR})
    assert codes(check_paths([tmp_path], source="transformers-5.23")) == []


def test_the_installed_models_leave_nothing_unread(installed_transformers):
    sources = map(read_source, find_sources([installed_transformers / "models"], []))
    modules = [read_module(source) for source in sources if b"_plan" in source.data]
    assert len(modules) > 400
    assert [use for module in modules for use in module.unresolved] == []


@pytest.mark.parametrize("default", ["", "=None"])
def test_a_setter_defines_no_plan(default):
    text = IN_CLASS.format(f"def tp_plan(self, plan{default}):\n        self._tp_plan = plan")
    assert read_module(SourceFile(Path("x.py"), text.encode())).unresolved == ()


_READ = {'{{{}: "colwise"}}': ["MIG506"], '{{"norm": {}}}': [], '{{"norm": "colwise"}} if {} else {{}}': ["MIG506"]}
"""What `check` says of each form where it can be read."""


@pytest.mark.parametrize("count", [300, 900, 1500, 4000])
@pytest.mark.parametrize("form", _READ)
def test_a_sum_without_end_is_one_clear_error(tmp_path, form, count):
    text = IN_CLASS.format("base_model_tp_plan = " + form.format(" + ".join(['"a"'] * count)))
    good = IN_CLASS.format(f"base_model_tp_plan = {{{PAIR}}}")
    write_tree(tmp_path, {"bad/configuration_bad.py": text, "bad/modeling_bad.py": REGULAR})
    write_tree(tmp_path, {"toy/configuration_toy.py": good, "toy/modeling_toy.py": REGULAR})
    for outcome, said in (
        (check_paths([tmp_path], source="transformers-5.23"), _READ[form]),
        (plan_rewrites([tmp_path]), []),
    ):
        assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
        findings = [found.finding.code for found in outcome.findings if found.path.name == "configuration_bad.py"]
        errors = [error.message for error in outcome.errors]
        assert len(errors) <= 1
        assert findings == ([] if errors else said)
        assert all("configuration_bad.py" in error for error in errors)
