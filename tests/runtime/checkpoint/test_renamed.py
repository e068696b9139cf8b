"""Folders that another release of transformers wrote: read where transformers renames, else refused with the release.

The cheap tests put the names of transformers 5.17 into a folder of the installed release. `make test-releases` has
other releases write theirs: FOLDERS are such as `pip install --no-deps --target FOLDER transformers==5.23.0` makes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from plans.errors import ConversionError, IncompleteError, MismatchError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.checkpoint import Layout
from runtime.checkpoint.files.file_names import MANIFEST, WEIGHTS
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from runtime.loader.loading import load
from runtime.validation.file_checks import check_files
from runtime.validation.request import ValidationRequest
from tests.runtime.checkpoint.release_writer import LAYOUTS, build_model, write_folders

ROOT = Path(__file__).parents[3]
HUB = ReshardTarget("hf")
FOLDERS = [name for name in os.environ.get("MIGRATOR_TRANSFORMERS_FOLDERS", "").split() if name]
ARIA = {"experts.gate_up_proj": "experts.fc1.weight", "mlp.experts.down_proj": "mlp.experts.fc2.weight"}
FIRST = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("today")
    write_folders(folder, "aria_text")
    return folder


def write_old(folder: Path, old: Path, names: Mapping[str, str], release: str = "5.17.0") -> Path:
    """Copy a folder, with other names in its files and its manifest, and another release recorded."""

    def rename(name: str) -> str:
        for new, before in names.items():
            name = name.replace(new, before)
        return name

    shutil.copytree(folder, old)
    for path in old.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {rename(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = {key: rename(text) for key, text in (file.metadata() or {}).items()}
        save_file(tensors, path, metadata)

    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"] = {rename(name): entry for name, entry in manifest["tensors"].items()}
        manifest["written_by"]["transformers"] = release

    edit(old, change)
    return old


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_bytes())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_that_transformers_maps_are_read(layout: Layout, today: Path, tmp_path: Path) -> None:
    old = write_old(today / layout, tmp_path / "old", ARIA)
    check_is_read(old, today / "hub", tmp_path)
    expected = {path.name: path.read_bytes() for path in (today / "ranks").iterdir() if path.suffix == ".safetensors"}
    execute_reshard(plan_reshard(old, Mesh(tp=2)), tmp_path / "ranks")
    assert {name: (tmp_path / "ranks" / name).read_bytes() for name in expected} == expected


def check_is_read(old: Path, hub: Path, scratch: Path) -> None:
    execute_reshard(plan_reshard(old, target=HUB), scratch / "hub")
    assert (scratch / "hub" / WEIGHTS).read_bytes() == (hub / WEIGHTS).read_bytes()
    assert verify(old).ok
    assert verify(old, hub).ok
    model = build_model("aria_text")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load(model, old)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(hub).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_a_rank_reads_its_own_file_under_its_old_names(today: Path, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(today / "hub"), tmp_path / "one")
    old = write_old(tmp_path / "one", tmp_path / "old", ARIA)
    checkpoint = open_checkpoint(old).read_headers(build_model("aria_text"))
    assert checkpoint.manifest is not None
    assert checkpoint.manifest.stored_names[FIRST].endswith("experts.fc1.weight")
    for source in (old, checkpoint):
        model = build_model("aria_text").to(torch.float32)
        wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.zero_grad()
        for parameter in model.parameters():
            parameter.data.zero_()
        load(model, source)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("names", "kind", "what"),
    [
        ({"o_proj": "out_of_another_release"}, IncompleteError, "self_attn.o_proj.weight"),
        ({**ARIA, "q_proj": "query"}, IncompleteError, "self_attn.q_proj.weight"),
    ],
)
def test_other_names_tell_which_release_wrote_them(
    layout: Layout, names: dict[str, str], kind: type[Exception], what: str, today: Path, tmp_path: Path
) -> None:
    old = write_old(today / layout, tmp_path / "old", names)
    with pytest.raises(kind) as caught:
        plan_reshard(old, target=HUB)
    message, hint = caught.value.message, caught.value.hint  # type: ignore[attr-defined]
    assert what in message
    assert f"transformers 5.17.0 wrote the folder, and {transformers.__version__} is installed" in message
    assert "with transformers 5.17.0, reshard it to `layout=hf`" in hint
    with pytest.raises(IncompleteError, match=r"transformers 5\.17\.0 wrote"):
        load(build_model("aria_text"), old)


def test_another_size_tells_which_release_wrote_it(today: Path, tmp_path: Path) -> None:
    old = write_old(today / "ranks", tmp_path / "old", ARIA)
    config = json.loads((old / "config.json").read_text("utf-8"))
    (old / "config.json").write_text(json.dumps({**config, "vocab_size": 30}))
    with pytest.raises(MismatchError, match=r"\[30, 16\] in the model but .*5\.17\.0 wrote the folder"):
        plan_reshard(old, target=HUB)


def test_the_digests_are_verified_whatever_the_names(today: Path, tmp_path: Path) -> None:
    old = write_old(today / "ranks", tmp_path / "old", {"o_proj": "out_of_another_release"})
    assert verify(old).ok
    (old / "config.json").unlink()
    assert verify(old).ok


def test_the_installed_release_renames_nothing(today: Path, tmp_path: Path) -> None:
    old = write_old(today / "ranks", tmp_path / "old", ARIA, transformers.__version__)
    with pytest.raises(IncompleteError, match="gate_up_proj"):
        plan_reshard(old, target=HUB)


def test_a_name_that_is_taken_is_not_given_twice(today: Path, tmp_path: Path) -> None:
    """Both names recorded: which of the two tensors is the model's cannot be known."""
    old = write_old(today / "ranks", tmp_path / "old", {})
    for path in old.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        tensors[FIRST.replace("gate_up_proj", "fc1.weight")] = tensors[FIRST].clone()
        save_file(tensors, path, {"format": "pt"})
    edit(old, lambda m: m["tensors"].update({FIRST.replace("gate_up_proj", "fc1.weight"): m["tensors"][FIRST]}))
    with pytest.raises(MismatchError, match=r"fc1\.weight', which the model does not have; .* 5\.17\.0 wrote"):
        plan_reshard(old, target=HUB)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_optimizer_with_old_names_is_refused(today: Path, tmp_path: Path) -> None:
    old = write_old(today / "ranks", tmp_path / "old", ARIA)
    state = {"state.model.layers.0.mlp.experts.fc1.weight.exp_avg": torch.zeros(2)}
    dcp.save(state, checkpoint_id=old / "optimizer", no_dist=True)
    with pytest.raises(ConversionError, match=r"the names that transformers 5\.17\.0 has") as caught:
        plan_reshard(old, Mesh())
    hint = "reshard it with transformers 5.17.0, or leave the state out with `optimizer=False`"
    assert caught.value.hint == hint
    plan_reshard(old, target=ReshardTarget("ranks", optimizer=False))


def test_a_plan_with_old_names_is_not_validated(today: Path, tmp_path: Path) -> None:
    old = write_old(today / "ranks", tmp_path / "old", ARIA)
    with pytest.raises(
        UsageError, match=r"transformers 5\.17\.0 wrote the folder, and .* was .*\.fc1\.weight there"
    ) as caught:
        check_files(ValidationRequest(old, Mesh(tp=2)))
    assert caught.value.hint == "reshard it, which gives the result today's names, and validate that"
    again = tmp_path / "again"
    execute_reshard(plan_reshard(old, Mesh(tp=2)), again)
    assert check_files(ValidationRequest(again, Mesh(tp=2))) is None


def run_writer(site: str, folder: Path, model_type: str) -> str:
    """Have a release write folders; return its version, empty if it does not have the type."""
    path = os.pathsep.join((str(ROOT), site))
    program = f"import transformers as t; print(t.__version__, {model_type!r} in t.CONFIG_MAPPING)"
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore"]
    found = subprocess.run(
        [*command, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    version, has_type = found.stdout.split()
    if has_type == "False":
        return ""
    module = "tests.runtime.checkpoint.release_writer"
    subprocess.run([*command, "-m", module, str(folder), model_type], cwd=ROOT, env=environment, check=True)
    return version


@pytest.mark.full
@pytest.mark.skipif(not FOLDERS, reason="MIGRATOR_TRANSFORMERS_FOLDERS names no other transformers")
@pytest.mark.parametrize("site", FOLDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_other_releases_are_read(site: str, layout: Layout, tmp_path: Path) -> None:
    assert run_writer(site, tmp_path / "written", "aria_text")
    check_is_read(tmp_path / "written" / layout, tmp_path / "written/hub", tmp_path)


@pytest.mark.full
@pytest.mark.skipif(not FOLDERS, reason="MIGRATOR_TRANSFORMERS_FOLDERS names no other transformers")
@pytest.mark.parametrize("site", FOLDERS)
def test_inkling2_tells_which_release_named_it(site: str, tmp_path: Path) -> None:
    """5.24 renamed its layers and cut its vocabulary, and its mapping starts from the names on the hub."""
    version = run_writer(site, tmp_path, "inkling2_text")
    if not version:
        pytest.skip("this release has no inkling2_text")
    for layout in LAYOUTS:
        with pytest.raises(IncompleteError, match=f"transformers {version} wrote the folder"):
            plan_reshard(tmp_path / layout, target=HUB)
