"""The layout guard on source, and on every experts class of the installed transformers."""

from __future__ import annotations

import pytest

from codemods.models.layouts import find_layout, read_layouts
from plans.model_facts import ExpertLayout, KeyTarget
from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, check_noop, check_transformed, codes, write_tree


def layouts(root, source):
    return read_layouts(write_tree(root, {"modeling_toy.py": source}))


def test_the_regular_layout(tmp_path):
    assert layouts(tmp_path, REGULAR) == (ExpertLayout("modeling_toy.py:ToyExperts"),)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * self.intermediate_dim", "self.intermediate_dim * 2"),
        ("torch.empty(self.num_experts,", "torch.zeros(self.num_experts + self.zero_experts,"),
        ("(torch.empty(", "(torch.empty(*[],"),
    ],
)
def test_other_ways_to_write_it(tmp_path, old, new):
    found = layouts(tmp_path, REGULAR.replace(old, new))
    assert found == ((ExpertLayout("modeling_toy.py:ToyExperts"),) if "*[]" not in new else (None,))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("_implementation\n", "_implementation(is_concatenated=False)\n"), "MIG102"),
        ((".chunk(2, dim=-1)", "[..., ::2]"), "MIG102"),
        (("_implementation\n", "_implementation(is_transposed=True)\n"), "MIG101"),
        (("_implementation\n", "_implementation(has_gate=False)\n"), "MIG103"),
        (("_implementation\n", "_implementation(has_bias=True)\n"), "MIG105"),
        (
            (
                "    def forward",
                "        self.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 2))\n\n    def forward",
            ),
            "MIG105",
        ),
    ],
)
def test_what_makes_a_layout_irregular(tmp_path, change, code):
    (found,) = layouts(tmp_path, REGULAR.replace(*change))
    assert found is not None
    assert found.irregularity == code


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("nn.functional.linear(hidden_states, self.gate_up_proj[0]).chunk(2, dim=-1)", "glu(hidden_states)"),
        (".chunk(2, dim=-1)", ".unflatten(-1, (-1, 2)).unbind(-1)"),
        (".chunk(2, dim=-1)", ".view(-1, 2)"),
        (".chunk(2, dim=-1)", ".chunk(2, dim=0)"),
        (".chunk(2, dim=-1)", ".chunk(2, dim=-1)[0].unflatten(-1, (-1, 2)).unbind(-1)"),
        ("_implementation\n", "_implementation(**FLAGS)\n"),
        ("_implementation\n", "_implementation(is_concatenated=FLAG)\n"),
        (".chunk(2, dim=-1)", "[slice(None, None, 2)]"),
        (
            "        self.down_proj =",
            "        self.scale = nn.Parameter(torch.empty(1, 2, 3))\n        self.down_proj =",
        ),
    ],
)
def test_what_does_not_show_is_not_assumed(tmp_path, old, new):
    assert layouts(tmp_path, REGULAR.replace(old, new)) == (None,)


BASE = ExpertLayout("modeling_toy.py:ToyExperts")
LINEAR = "nn.functional.linear(hidden_states, self.gate_up_proj[0])"
HALVED = f"gate, up = {LINEAR}.chunk(2, dim=-1)"


def forward(*lines, methods=""):
    """The regular experts with other lines in place of the one that halves the product."""
    return REGULAR.replace(HALVED, "\n        ".join(lines)) + methods


APPLY_GATE = """
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up
"""
SHOWN = {
    "a function": [f"gate, up = torch.chunk({LINEAR}, 2, dim=-1)"],
    "by keyword": [f"gate, up = {LINEAR}.chunk(chunks=2, dim=-1)"],
    "by position": [f"gate, up = {LINEAR}.chunk(2, -1)"],
    "a local name": [f"both = {LINEAR}", "gate, up = both.chunk(2, dim=-1)"],
    "the halves in a name": [f"halves = {LINEAR}.chunk(2, dim=-1)", "gate, up = halves"],
    "an alias": ["weight = self.gate_up_proj", "gate, up = F.linear(hidden_states, weight[0]).chunk(2, dim=-1)"],
    "two at once": [
        "first, second = self.gate_up_proj[0], self.down_proj[0]",
        "gate, up = F.linear(hidden_states, first).chunk(2, dim=-1)",
    ],
    "an operator": ["gate, up = (hidden_states @ self.gate_up_proj[index].mT).chunk(2, dim=-1)"],
    "transposed for it": ["gate, up = torch.bmm(index, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)"],
    "a method": ["gate, up = hidden_states.matmul(self.gate_up_proj[0].t()).chunk(2, dim=-1)"],
    "einsum": ['gate, up = torch.einsum("th,eoh->teo", hidden_states, self.gate_up_proj).chunk(2, dim=-1)'],
    "other precision": [f"gate, up = {LINEAR}.float().to(index.dtype).chunk(2, dim=-1)"],
    "scaled and shifted": [f"both = {LINEAR} * weights + 1", "both += weights", "gate, up = both.chunk(2, dim=-1)"],
    "a dim before the last": [f"gate, up = {LINEAR}.unsqueeze(0).squeeze(0).chunk(2, dim=-1)"],
    "in a loop and a branch": [
        "for expert in index:",
        "    if expert is not None:",
        f"        both = {LINEAR}",
        "    gate, up = both.chunk(2, dim=-1)",
    ],
    "its facts": ["print(self.gate_up_proj.shape[0], self.gate_up_proj.size(0), len(self.gate_up_proj))", HALVED],
    "whether it is there": ["if self.gate_up_proj is None:", "    return hidden_states", HALVED],
    "split into two sizes": [f"gate, up = torch.split({LINEAR}, [self.width, self.width], -1)"],
    "split by a method": [f"gate, up = {LINEAR}.split([width, width], dim=-1)"],
    "split by half the dim": [f"gate, up = {LINEAR}.split(self.intermediate_dim, dim=-1)"],
    "split by half of what is there": [f"both = {LINEAR}", "gate, up = both.split(both.shape[-1] // 2, dim=-1)"],
    "two sections": [f"gate, up = torch.tensor_split({LINEAR}, 2, dim=-1)"],
    "slices": [f"both = {LINEAR}", "gate = both[..., : self.width]", "up = both[..., self.width :]"],
    "slices of two dims": [f"both = {LINEAR}", "gate, up = both[:, :width], both[:, width:]"],
    "slices with both ends": [f"both = {LINEAR}", "gate, up = both[..., 0:width], both[..., width : 2 * width]"],
    "narrowed": [f"both = {LINEAR}", "gate, up = both.narrow(-1, 0, width), torch.narrow(both, -1, width, width)"],
    "halves by index": [f"halves = {LINEAR}.chunk(2, dim=-1)", "gate, up = halves[0], halves[1]"],
    "rows of one expert": [
        "weight = self.gate_up_proj[index]",
        "gate, up = F.linear(hidden_states, weight[:width]), F.linear(hidden_states, weight[width:])",
    ],
    "rows of all experts": ["w_gate, w_up = self.gate_up_proj[:, :width], self.gate_up_proj[:, width:, :]"],
    "rows of an expert by two indices": [
        "gate = F.linear(hidden_states, self.gate_up_proj[index, :width])",
        "up = F.linear(hidden_states, self.gate_up_proj[index, width:])",
    ],
    "weights in two": ["w_gate, w_up = self.gate_up_proj.chunk(2, dim=1)"],
    "an expert's weights in two": ["w_gate, w_up = self.gate_up_proj[index].chunk(2, dim=0)"],
    "transposed weights in two": ["w_gate, w_up = self.gate_up_proj.transpose(1, 2).chunk(2, dim=-1)"],
    "random values": ["nn.init.normal_(self.gate_up_proj, std=0.02)", "self.gate_up_proj.data.normal_()", HALVED],
}


@pytest.mark.parametrize("lines", SHOWN.values(), ids=SHOWN)
def test_a_product_that_is_halved_shows_the_layout(tmp_path, lines):
    assert layouts(tmp_path, forward(*lines)) == (BASE,)


def test_a_product_is_followed_into_a_method(tmp_path):
    called = forward(f"gate = up = self._apply_gate({LINEAR})", methods=APPLY_GATE)
    assert layouts(tmp_path, called) == (BASE,)
    assert layouts(tmp_path, called.replace("_gate(nn", "_gate(gate_up=nn")) == (BASE,)
    assert layouts(tmp_path, called.replace("self._apply_gate(nn", "self._other(nn")) == (None,)
    assert layouts(tmp_path, called.replace("gate_up.chunk", "sort(gate_up).chunk")) == (None,)
    assert layouts(tmp_path, called.replace("= gate_up.chunk", "= self._apply_gate(gate_up).chunk")) == (None,)
    assert layouts(tmp_path, called.replace("    def _apply", "    @sorted_rows\n    def _apply")) == (None,)


UNSHOWN = {
    "a product in another order": [
        f"both = {LINEAR}",
        "both = both.reshape(*both.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)",
        "gate, up = both.chunk(2, dim=-1)",
    ],
    "an alias in another order": [
        "weight = self.gate_up_proj",
        "weight = weight.view(8, -1, 2, 16).transpose(1, 2).reshape(8, -1, 16)",
        "gate, up = F.linear(hidden_states, weight[0]).chunk(2, dim=-1)",
    ],
    "a helper": [f"gate, up = deinterleave({LINEAR}).chunk(2, dim=-1)"],
    "a helper for the weights": ["gate, up = F.linear(hidden_states, order(self.gate_up_proj)[0]).chunk(2, dim=-1)"],
    "a method of no class here": [f"gate, up = self._glu({LINEAR})", "weights.chunk(2, dim=-1)"],
    "a chunk of something else": [
        "a, b = hidden_states.chunk(2, dim=-1)",
        f'gate, up = rearrange({LINEAR}, "t (d two) -> two t d", two=2)',
    ],
    "split into unequal sizes": [f"gate, up = torch.split({LINEAR}, [self.width, self.other], -1)"],
    "split into three": [f"gate, up, rest = torch.split({LINEAR}, [width, width, width], -1)"],
    "split by another size": [f"gate, up = {LINEAR}.split(self.hidden_dim, dim=-1)"],
    "split along another dim": [f"gate, up = {LINEAR}.split([width, width])"],
    "slices that overlap": [f"both = {LINEAR}", "gate, up = both[..., :width], both[..., half:]"],
    "one slice": [f"both = {LINEAR}", "gate = both[..., :width]"],
    "a slice and the others": [f"both = {LINEAR}", "gate, up = both[..., :width], both[..., width::step]"],
    "slices of tokens": [f"both = {LINEAR}", "gate, up = both[:width], both[width:]"],
    "every second by slice": [f"both = {LINEAR}", "gate, up = both[..., 0::step], both[..., 1::step]"],
    "columns of the weights": [
        "weight = self.gate_up_proj[index]",
        "gate, up = F.linear(hidden_states, weight[:, :width]), F.linear(hidden_states, weight[:, width:])",
    ],
    "rows of a transposed expert": [
        "weight = self.gate_up_proj[index].T",
        "gate, up = hidden_states @ weight[:width], hidden_states @ weight[width:]",
    ],
    "experts in two": ["w_gate, w_up = self.gate_up_proj.chunk(2, dim=0)"],
    "one of the halves": [f"halves = {LINEAR}.chunk(2, dim=-1)", "gate = up = halves[0]"],
    "narrowed twice alike": [f"both = {LINEAR}", "gate, up = both.narrow(-1, 0, width), both.narrow(-1, 1, width)"],
    "a computed index": [
        f"both = {LINEAR}",
        "gate, up = both[..., self.even], both[..., self.odd]",
        "weights.chunk(2, dim=-1)",
    ],
    "rows by index": ["gate, up = F.linear(hidden_states, self.gate_up_proj[0][order]).chunk(2, dim=-1)"],
    "rows by slice": ["gate, up = F.linear(hidden_states, self.gate_up_proj[:, order]).chunk(2, dim=-1)"],
    "three parts": [f"gate, up, rest = {LINEAR}.chunk(3, dim=-1)"],
    "another dim": [f"gate, up = {LINEAR}.chunk(2, dim=0)"],
    "both ways": [HALVED, "other = unpack(self.gate_up_proj)"],
    "one of two ways": ["if weights:", f"    {HALVED}", "else:", f"    gate = up = swiglu({LINEAR})"],
    "new values": ["self.gate_up_proj.data = weights", HALVED],
    "rows assigned": ["self.gate_up_proj[0] = weights", HALVED],
    "copied over": ["self.gate_up_proj.copy_(weights)", HALVED],
    "set by name": ['setattr(self, "gate_up_proj", weights)', HALVED],
    "got by name": ['weight = getattr(self, "gate_up_proj")', HALVED],
    "deleted": ["del self.gate_up_proj", HALVED],
    "kept elsewhere": ["self.weight = self.gate_up_proj", HALVED],
    "handed on whole": ["reorder(self)", HALVED],
    "under another name": ["module = self", "reorder(module)", HALVED],
    "with all parameters": ["for one in self.parameters():", "    reorder(one)", HALVED],
    "the first operand": ["gate, up = (self.gate_up_proj[0] @ hidden_states).chunk(2, dim=-1)"],
    "einsum with rows before": [
        'gate, up = torch.einsum("th,oh->ot", hidden_states, self.gate_up_proj[0]).chunk(2, dim=-1)'
    ],
    "reordered in the next round": [
        "both = hidden_states",
        "for expert in index:",
        "    done = permute(both)",
        f"    both = {LINEAR}",
        "    gate, up = both.chunk(2, dim=-1)",
    ],
    "in a comprehension": ["parts = [mix(one) for one in self.gate_up_proj]", HALVED],
    "in a lambda": ["later = lambda: mix(self.gate_up_proj)", HALVED],
}


@pytest.mark.parametrize("lines", UNSHOWN.values(), ids=UNSHOWN)
def test_a_product_in_another_order_or_out_of_sight_does_not(tmp_path, lines):
    assert layouts(tmp_path, forward(*lines)) == (None,)


@pytest.mark.parametrize(
    "outside",
    [
        "ToyExperts.forward = interleaved_forward",
        "if FAST:\n    ToyExperts._apply_gate = fast",
        'setattr(ToyExperts, "forward", interleaved_forward)',
        "ToyExperts = patched(ToyExperts)",
    ],
)
def test_a_class_that_is_changed_from_outside_does_not_show_its_layout(tmp_path, outside):
    assert layouts(tmp_path, f"{REGULAR}\n\n{outside}\n") == (None,)
    assert layouts(tmp_path, f"{REGULAR}\n\n{outside.replace('ToyExperts', 'ToyModel')}\n") == (BASE,)


def test_nor_does_one_whose_forward_is_put_in_its_place(tmp_path):
    assert layouts(tmp_path, REGULAR + "\n    forward = interleaved_forward\n") == (None,)
    assert layouts(tmp_path, REGULAR.replace("@use", "@interleaved\n@use")) == (None,)


@pytest.mark.parametrize(
    ("imports", "bases"),
    [
        ("", "nn.Module, Generic[T]"),
        ("", "nn.Module, Generic[T, U]"),
        ("from torch.nn import Linear, Module as M\n", "M"),
    ],
)
def test_bases_that_change_nothing(tmp_path, imports, bases):
    source = imports + REGULAR.replace("nn.Module", bases)
    assert layouts(tmp_path, source) == (BASE,)
    assert layouts(tmp_path, source.replace(" as M", " as N").replace("Generic", "Fused")) == (None,)


@pytest.mark.parametrize("made", ["torch.nn.Parameter(", "Parameter("])
def test_a_parameter_by_another_name_is_seen(tmp_path, made):
    transposed = REGULAR.replace("2 * self.intermediate_dim, self.hidden_dim", "self.hidden_dim, 2 * self.width")
    (found,) = layouts(tmp_path, transposed.replace("nn.Parameter(", made)) or ("missed",)
    assert found is None
    both = layouts(tmp_path, REGULAR + transposed.replace("nn.Parameter(", made).replace("ToyExperts", "BarExperts"))
    assert both == (ExpertLayout("modeling_toy.py:ToyExperts"), None)


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "bias"])
def test_a_registered_bias_counts(tmp_path, name):
    registered = f"        self.register_parameter({name!r}, nn.Parameter(torch.zeros(2, 2)))\n\n    def forward"
    (found,) = layouts(tmp_path, REGULAR.replace("    def forward", registered))
    assert found is not None
    assert found.irregularity == "MIG105"
    (found,) = layouts(
        tmp_path, REGULAR.replace("    def forward", registered.replace("nn.Parameter(torch.zeros(2, 2))", "None"))
    )
    assert found is not None
    assert found.irregularity is None


def test_shapes_that_do_not_fit_are_not_guessed(tmp_path):
    assert layouts(tmp_path, REGULAR.replace("2 * self.intermediate_dim", "self.width")) == (None,)
    assert layouts(tmp_path, REGULAR.replace("self.down_proj =", "self.other =")) == (None,)


def test_dense_modules_are_no_experts(tmp_path):
    dense = REGULAR.replace("self.num_experts, ", "")
    assert layouts(tmp_path, dense) == ()
    separate = REGULAR.replace("gate_up_proj", "up_proj").replace(
        "        self.down_proj", "        self.gate_proj = nn.Parameter(torch.empty(1, 2, 3))\n        self.down_proj"
    )
    assert layouts(tmp_path, separate) == ()


MODEL = """

class ToyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = {name}(config)


class ToyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp = ToyBlock(config)


class ToyModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(2)])
"""


def heir(body, bases="ToyExperts", decorator=""):
    """The regular experts and a class that inherits from them."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    return f"{REGULAR}\n\n{decorator}\nclass OwnExperts({bases}):\n{indented}"


SAME = {
    "nothing": "pass",
    "another method": "def count(self):\n    return len(self.gate_up_proj)",
    "around the inherited forward": "def forward(self, *args):\n    return 2 * super().forward(*args)",
    "around the named forward": "def forward(self, *args):\n    return 2 * ToyExperts.forward(self, *args)",
    "its own chunk": (
        "def forward(self, x):\n    gate, up = F.linear(x, self.gate_up_proj[1]).chunk(2, dim=-1)\n    return gate * up"
    ),
    "around init": "def __init__(self, config):\n    super().__init__(config)\n    self.count = 2",
}


@pytest.mark.parametrize("body", SAME.values(), ids=SAME)
def test_a_class_has_the_layout_that_it_inherits(tmp_path, body):
    assert layouts(tmp_path, heir(body)) == (BASE, ExpertLayout("modeling_toy.py:OwnExperts"))


IRREGULAR = {
    "a bias": (
        "def __init__(self, config):\n    super().__init__(config)\n"
        "    self.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 2))",
        "MIG105",
    ),
    "another forward": ("def forward(self, x):\n    return x[..., ::2] * x[..., 1::2]", "MIG102"),
    "another shape": (
        "def __init__(self, config):\n    super().__init__(config)\n"
        "    self.gate_up_proj = nn.Parameter(torch.empty(8, self.hidden_dim, 2 * self.intermediate_dim))\n"
        "    self.down_proj = nn.Parameter(torch.empty(8, self.intermediate_dim, self.hidden_dim))",
        "MIG101",
    ),
}


@pytest.mark.parametrize(("body", "code"), IRREGULAR.values(), ids=IRREGULAR)
def test_what_a_class_makes_irregular_of_what_it_inherits(tmp_path, body, code):
    base, own = layouts(tmp_path, heir(body))
    assert (base, own and own.irregularity) == (BASE, code)


UNCLEAR = {
    "a forward that does not show it": "def forward(self, x):\n    return fused(x, self.gate_up_proj)",
    "another parameter": (
        "def __init__(self, config):\n    super().__init__(config)\n    self.scale = nn.Parameter(torch.ones(1, 2, 3))"
    ),
    "a parameter made something else": (
        "def __init__(self, config):\n    super().__init__(config)\n    self.gate_up_proj = pack(self.gate_up_proj)"
    ),
    "parameters of its own making": "def __init__(self, config):\n    self.gate_up_proj = make(config)",
    "a parameter in another order": (
        "def forward(self, x):\n"
        "    packed = self.gate_up_proj[0].reshape(-1, 2, 4).transpose(0, 1)\n"
        "    gate, up = (x @ packed).chunk(2, dim=-1)\n    return gate * up"
    ),
}


@pytest.mark.parametrize("body", UNCLEAR.values(), ids=UNCLEAR)
def test_a_class_that_cannot_be_understood_is_not_taken_for_its_base(tmp_path, body):
    assert layouts(tmp_path, heir(body)) == (BASE, None)


def test_a_base_from_elsewhere_may_do_anything(tmp_path):
    assert layouts(tmp_path, heir("pass", "FusedMixin, ToyExperts")) == (BASE, None)
    assert layouts(tmp_path, REGULAR.replace("nn.Module", "FusedExperts")) == (None,)


def test_a_base_in_another_file_of_the_model_is_read(tmp_path):
    own = "class OwnExperts(ToyExperts):\n    def forward(self, x):\n        return x[..., ::2]\n"
    write_tree(tmp_path, {"modeling_toy.py": REGULAR, "modeling_toy_own.py": own})
    assert [layout and layout.irregularity for layout in read_layouts(tmp_path)] == [None, "MIG102"]


def test_an_heir_of_an_heir_and_its_flags(tmp_path):
    source = heir("pass", decorator="@use_experts_implementation(is_transposed=True)")
    source += "\n\nclass LastExperts(OwnExperts):\n    pass\n"
    assert [layout and layout.irregularity for layout in layouts(tmp_path, source)] == [None, "MIG101", "MIG101"]
    computed = source.replace("is_transposed=True", "is_transposed=FLAG")
    assert layouts(tmp_path, computed) == (BASE, None, None)


def test_what_the_key_names_decides(tmp_path):
    write_tree(tmp_path, {"modeling_toy.py": heir(IRREGULAR["another forward"][0])})
    assert find_layout(tmp_path, KeyTarget("experts", None, "modeling_toy.py:ToyExperts")) == BASE
    own = find_layout(tmp_path, KeyTarget("experts", None, "modeling_toy.py:OwnExperts"))
    assert own is not None
    assert own.irregularity == "MIG102"
    assert find_layout(tmp_path, KeyTarget("module", None, "modeling_toy.py:Elsewhere")) is None
    assert find_layout(tmp_path, None) is None, "two classes, and nothing says which"


@pytest.mark.parametrize("body", SAME.values(), ids=SAME)
def test_a_plan_is_rewritten_for_the_class_that_the_model_makes(tmp_path, body):
    check_transformed(tmp_path, PACKED, MIGRATED, heir(body) + MODEL.format(name="OwnExperts"))


@pytest.mark.parametrize(
    ("body", "code"),
    [*IRREGULAR.values(), *((body, "MIG203") for body in UNCLEAR.values())],
    ids=[*IRREGULAR, *UNCLEAR],
)
def test_a_plan_stays_where_that_class_is_not_regular(tmp_path, body, code):
    modeling = heir(body) + MODEL.format(name="OwnExperts")
    assert codes(check_noop(tmp_path / "own", PACKED, modeling)) == [code]
    unused = heir(body) + MODEL.format(name="ToyExperts")
    check_transformed(tmp_path / "unused", PACKED, MIGRATED, unused)
