"""`reshard`, `verify` and `inspect` on other stacks' rank files, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoint import open as checkpoint_open
from runtime.checkpoint.resharding import execute
from tests.external_files import DEEPSEEK, MLA, MLA_WHOLE, TP, Cut, shard, state_of, stored_in, whole, write
from tests.tiny_models import tiny_config, tiny_model

Run = Callable[..., tuple[int, str, list[str]]]
Hub = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
TWO = ("--from-pattern", DEEPSEEK, "--from-tp", 2)
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """Return a function from a family's name to a tiny model's folder, written by save_pretrained as one file."""
    folders: dict[str, Path] = {}

    def saved(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family) / "hub"
            tiny_model(tiny_config(family)).save_pretrained(folders[family])
        return folders[family]

    return saved


@pytest.fixture
def llama(hub: Hub, tmp_path: Path) -> Path:
    """Two rank files of llama; tests damage them."""
    return write(tmp_path / "foreign", hub("llama"), state_of(hub("llama")), TP, tp=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(file)), file)


EXPERTS = {"model.layers.*.mlp.experts.gate_up_proj": {"packed": [1, 2]}}
ATTENTION = {
    "model.layers.*.self_attn.q_b_proj": "colwise",
    "model.layers.*.self_attn.kv_b_proj.weight": {"shard": 0},
    "model.layers.*.self_attn.o_proj": "rowwise",
}


@pytest.mark.parametrize(
    ("family", "names", "cuts", "tp", "ep", "plan"),
    [
        ("llama", state_of, TP, 2, 1, None),
        ("llama", state_of, TP, 4, 1, None),
        ("qwen3_moe", state_of, TP, 2, 1, EXPERTS),
        ("qwen3_moe", state_of, TP, 2, 2, None),
        ("qwen3_moe", state_of, TP, 2, 4, None),
        ("qwen3_moe", state_of, TP, 1, 4, None),
        ("qwen3_moe", stored_in, TP, 4, 1, None),
        ("qwen3_moe", stored_in, TP, 2, 4, None),
        ("deepseek_v3", state_of, MLA_WHOLE, 4, 1, EXPERTS),
        ("deepseek_v3", stored_in, MLA_WHOLE, 2, 2, None),
        ("deepseek_v3", state_of, MLA, 4, 1, ATTENTION | EXPERTS),
        ("deepseek_v3", stored_in, MLA, 2, 2, ATTENTION),
    ],
)
def test_files_sharded_by_torch_become_what_save_pretrained_wrote(
    family: str,
    names: Callable[[Path], Tensors],
    cuts: dict[str, Cut],
    tp: int,
    ep: int,
    plan: object,
    hub: Hub,
    migrator: Run,
    tmp_path: Path,
) -> None:
    source = write(tmp_path / "foreign", hub(family), names(hub(family)), cuts, tp=tp, ep=ep)
    options: list[object] = ["--from-pattern", DEEPSEEK, "--from-tp", tp, "--from-ep", ep]
    if plan is not None:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        options += ["--plan", tmp_path / "plan.json"]
    assert migrator("reshard", source, tmp_path / "out", *options, "--quiet") == (0, "", [])
    assert contents(tmp_path / "out") == contents(hub(family))


def test_the_result_on_another_mesh_has_a_manifest_and_the_same_content(
    llama: Path, hub: Hub, migrator: Run, tmp_path: Path
) -> None:
    code, _, errors = migrator("reshard", llama, tmp_path / "ranks", *TWO, "--tp", 4, "--layout", "ranks", "--quiet")
    assert (code, errors) == (0, [])
    assert migrator("verify", tmp_path / "ranks", hub("llama"))[0] == 0
    assert (
        migrator("verify", tmp_path / "ranks")[1]
        .splitlines()[-1]
        .startswith("every copy matches the manifest's digest")
    )


def test_parts_and_a_config_from_elsewhere(hub: Hub, migrator: Run, tmp_path: Path) -> None:
    pattern = "shard-{rank}-part-{part:05d}.safetensors"
    source = write(tmp_path / "foreign", hub("qwen3_moe"), state_of(hub("qwen3_moe")), TP, tp=2)
    for rank in range(2):
        tensors = load_file(source / f"model{rank}-mp2.safetensors")
        for part in range(3):
            some = {name: tensors[name] for name in list(tensors)[part::3]}
            save_file(some, source / f"shard-{rank}-part-{part:05d}.safetensors")
        (source / f"model{rank}-mp2.safetensors").unlink()
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("/etc/hostname")  # Another one stands in for it, wherever it leads.
    (tmp_path / "plan.json").write_text(json.dumps(EXPERTS))
    files = ("--config", hub("qwen3_moe") / "config.json", "--plan", tmp_path / "plan.json")
    options = ("--from-pattern", pattern, "--from-tp", 2, *files, "--quiet")
    assert migrator("reshard", source, tmp_path / "out", *options) == (0, "", [])
    assert contents(tmp_path / "out") == contents(hub("qwen3_moe"))
    (source / "shard-1-part-00001.safetensors").unlink()
    code, _, errors = migrator("reshard", source, tmp_path / "again", *options)
    assert (code, "part 1 of rank 1 is missing" in errors[0]) == (2, True)


def test_the_step_for_rank_files_of_deepseek_works(llama: Path, hub: Hub, migrator: Run, tmp_path: Path) -> None:
    """The options of the hint are taken as they stand."""
    code, _, errors = migrator("reshard", llama, tmp_path / "out")
    assert code == 2
    assert "contains rank files as DeepSeek's convert.py writes them" in errors[0]
    match = re.search(r"`(--from-pattern .*?)`", " ".join(errors[1:]))
    assert match is not None
    assert migrator("reshard", llama, tmp_path / "out", *shlex.split(match[1]), "--quiet") == (0, "", [])
    assert migrator("verify", tmp_path / "out", hub("llama"))[0] == 0


def test_experts_of_sharded_state_are_never_read_on_trust(hub: Hub, migrator: Run, tmp_path: Path) -> None:
    """vLLM's kernels may have exchanged gate and up, which no shape shows; its default pattern names such files."""
    source = write(tmp_path / "foreign", hub("qwen3_moe"), state_of(hub("qwen3_moe")), TP, tp=2)
    for rank in range(2):
        (source / f"model{rank}-mp2.safetensors").rename(source / f"model-rank-{rank}-part-0.safetensors")
    (tmp_path / "plan.json").write_text(json.dumps(EXPERTS))
    options = ("--from-pattern", "model-rank-{rank}-part-{part}.safetensors", "--from-tp", 2)
    code, _, errors = migrator("reshard", source, tmp_path / "out", *options, "--plan", tmp_path / "plan.json")
    assert code == 2
    assert "may hold gate and up exchanged in the same shape: 'model.layers.0.mlp.experts.gate_up_proj'" in errors[0]
    assert "use the checkpoint that they were saved from" in errors[1]


def test_a_dense_model_of_sharded_state_is_read(hub: Hub, migrator: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "foreign", hub("llama"), state_of(hub("llama")), TP, tp=2)
    for rank in range(2):
        (source / f"model{rank}-mp2.safetensors").rename(source / f"model-rank-{rank}-part-0.safetensors")
    options = ("--from-pattern", "model-rank-{rank}-part-{part}.safetensors", "--from-tp", 2, "--quiet")
    assert migrator("reshard", source, tmp_path / "out", *options) == (0, "", [])
    assert migrator("verify", tmp_path / "out", hub("llama"))[0] == 0


def test_tied_names_may_be_stored_twice_if_they_are_the_same(
    llama: Path, hub: Hub, migrator: Run, tmp_path: Path
) -> None:
    for file in llama.glob("*.safetensors"):
        changed(file, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert migrator("reshard", llama, tmp_path / "out", *TWO, "--quiet") == (0, "", [])
    assert contents(tmp_path / "out") == contents(hub("llama"))
    changed(file, lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1})
    code, _, errors = migrator("reshard", llama, tmp_path / "again", *TWO)
    assert code == 2
    assert "lm_head.weight is tied to model.embed_tokens.weight but stored with other values" in errors[0]
    assert errors[1] == ("hint: set tie_word_embeddings to false in config.json, or save the files with one of the two")
    config = (llama / "config.json").read_text()
    (llama / "config.json").write_text(json.dumps(json.loads(config) | {"tie_word_embeddings": False}))
    assert migrator("reshard", llama, tmp_path / "untied", *TWO, "--quiet") == (0, "", [])
    (llama / "config.json").write_text(config)
    for file in llama.glob("*.safetensors"):
        changed(file, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    assert migrator("reshard", llama, tmp_path / "tied", *TWO, "--quiet") == (0, "", [])
    assert contents(tmp_path / "tied") == contents(hub("llama"))


def test_verify_compares_and_reads_every_copy(llama: Path, hub: Hub, migrator: Run) -> None:
    code, out, _ = migrator("verify", llama, hub("llama"), *TWO)
    assert (code, "the same content" in out, "foreign, 38 tensors" in out) == (0, True, True)
    changed(llama / "model1-mp2.safetensors", lambda tensors: {**tensors, O_PROJ: tensors[O_PROJ] + 1})
    code, out, _ = migrator("verify", llama, hub("llama"), *TWO)
    assert (code, O_PROJ in out) == (1, True)
    changed(llama / "model1-mp2.safetensors", lambda tensors: {**tensors, NORM: tensors[NORM] + 1})
    code, out, _ = migrator("verify", llama, *TWO)
    assert (code, f"{NORM!r} should be the same in" in out) == (1, True)


def test_inspect_shows_the_mesh_and_what_each_rank_holds(llama: Path, migrator: Run) -> None:
    code, out, errors = migrator("inspect", llama, *TWO, "--format", "json")
    assert (code, errors) == (0, [])
    found = json.loads(out)
    assert found["layout"] == "foreign"
    assert found["held"]["mesh"]["tp"] == 2
    assert len(found["files"]) == 2


def absent_rank(folder: Path) -> None:
    (folder / "model1-mp2.safetensors").unlink()


def rank_over(folder: Path) -> None:
    shutil.copy(folder / "model1-mp2.safetensors", folder / "model2-mp2.safetensors")


def manifest(folder: Path) -> None:
    (folder / "migrator.json").write_text("{}")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_names(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        changed(file, fused)


def fused(tensors: Tensors) -> Tensors:
    layer = "model.layers.1.self_attn."
    qkv = torch.cat([tensors.pop(f"{layer}{one}_proj.weight") for one in "qkv"])
    return {**tensors, f"{layer}qkv_proj.weight": qkv}


def extra(folder: Path) -> None:
    changed(folder / "model0-mp2.safetensors", lambda tensors: {**tensors, "model.rotary.table": torch.zeros(2)})


def absent_tensor(folder: Path) -> None:
    changed(folder / "model1-mp2.safetensors", lambda tensors: {n: t for n, t in tensors.items() if n != NORM})


def flipped_copy(folder: Path) -> None:
    file = folder / "model1-mp2.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + json.loads(data[8:begin])[NORM]["data_offsets"][0]] ^= 1
    file.write_bytes(data)


def one_dtype_more(folder: Path) -> None:
    changed(folder / "model1-mp2.safetensors", lambda tensors: {**tensors, O_PROJ: tensors[O_PROJ].bfloat16()})


def truncated(folder: Path) -> None:
    file = folder / "model1-mp2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def hostile(folder: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [99999999999, 99999999999], "data_offsets": [0, 8]}}'
    (folder / "model1-mp2.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def link_out(folder: Path) -> None:
    file = folder / "model1-mp2.safetensors"
    file.rename(folder.parent / "elsewhere.safetensors")
    file.symlink_to(folder.parent / "elsewhere.safetensors")


def pipe(folder: Path) -> None:
    (folder / "model1-mp2.safetensors").unlink()
    os.mkfifo(folder / "model1-mp2.safetensors")


def pipe_for_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


DAMAGES = {
    absent_rank: "1 of 2 ranks have no file, the first is rank 1 | copy the missing files, or correct --from-tp and",
    rank_over: (
        "'model2-mp2.safetensors' would belong to rank 2, but the ranks are 0 to 1 | "
        "correct --from-tp and --from-ep, or move files of another checkpoint away"
    ),
    manifest: "has a migrator.json | leave --from-pattern and the settings that belong to it out",
    no_config: "no config.json | copy the model's config.json there, as ",
    other_names: "qkv_proj.weight' name no tensor of LlamaForCausalLM | rename them, and split fused",
    extra: "'model.rotary.table' name no tensor of LlamaForCausalLM | save the files without them",
    absent_tensor: f"rank 1 has no {NORM!r}, but Replicate over tp=2 gives it [32] | check --from-tp, --from-ep and",
    flipped_copy: f"{NORM!r} should be the same in  | give its placement in --plan if the plan is wrong",
    one_dtype_more: f"{O_PROJ!r} is BF16, on other ranks F32 | the files belong to several checkpoints; save the model",
    truncated: "truncated | download or save the file again",
    hostile: "tensor 'a' is F32 [99999999999, 99999999999] but spans 8 bytes",
    pipe: "model1-mp2.safetensors: not a regular file",
    pipe_for_config: "config.json: cannot be read: not a regular file",
    link_out: "a link that leads out of the checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__)
def test_files_that_do_not_fit_are_refused_by_name(
    damage: Callable[[Path], None], llama: Path, migrator: Run, tmp_path: Path
) -> None:
    damage(llama)
    code, out, errors = migrator("reshard", llama, tmp_path / "out", *TWO)
    assert (code, out) == (2, "")
    assert len(errors) == 2, errors
    message, _, hint = DAMAGES[damage].partition(" | ")
    assert message in errors[0]
    assert errors[1].startswith(f"hint: {hint}")
    assert not (tmp_path / "out").exists()


def test_expected_names_are_listed(llama: Path, migrator: Run, tmp_path: Path) -> None:
    other_names(llama)
    _, _, errors = migrator("reshard", llama, tmp_path / "out", *TWO)
    expected = ", ".join(f"'model.layers.1.self_attn.{one}_proj.weight'" for one in "kqv")
    assert errors[1].endswith(f"expected are {expected}")


WRONG = {
    "no rank": (
        ("--from-pattern", "model.safetensors", "--from-tp", 2),
        "has no {rank} | write it like 'model{rank}-mp{world}.safetensors' or",
    ),
    "a path": (
        ("--from-pattern", "../model{rank}.safetensors", "--from-tp", 2),
        "contains a path | name the folder as the source, and its files by the pattern",
    ),
    "another format": (
        ("--from-pattern", "model{rank}.pt", "--from-tp", 2),
        "does not end in .safetensors | save files of other formats as safetensors",
    ),
    "unlike all": (
        ("--from-pattern", "rank{rank}.safetensors", "--from-tp", 2),
        "the folder has 'model0-mp2.safetensors', 'model1-mp2.safetensors' | correct --from-pattern",
    ),
    "more ranks": (
        ("--from-pattern", DEEPSEEK, "--from-tp", 4),
        "has files of 2 ranks, not of 4 | correct --from-tp and --from-ep",
    ),
    "no size": (("--from-pattern", DEEPSEEK), "--from-pattern needs --from-tp"),
    "no pattern": (("--from-tp", 2), "--from-tp describes another stack's rank files"),
    "no pattern for a plan": (("--plan", "plan.json"), "--plan describes another stack's rank files"),
    "uneven groups": (
        ("--from-pattern", DEEPSEEK, "--from-tp", 4, "--from-ep", 6),
        "--from-ep 6 is not a multiple of --from-tp 4 | an expert group holds whole tensor parallel groups",
    ),
    "a mode without experts": (
        ("--from-pattern", DEEPSEEK, "--from-tp", 2, "--from-mode", "tp_ep"),
        "--from-mode tp_ep does not go with --from-ep 1 | give --from-ep with the modes ep and tp_ep",
    ),
    "a long pattern": (("--from-pattern", "a" * 9999, "--from-tp", 2), "--from-pattern 'aaaa"),
    "a long pattern that fits nothing": (
        ("--from-pattern", "{rank}" + "a" * 9999 + ".safetensors", "--from-tp", 2),
        "no file matches {rank}aaaa",
    ),
    "another file for a config": ((*TWO, "--config", "my.json"), "--config my.json: not a config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_make_no_sense_are_refused(case: str, llama: Path, migrator: Run, tmp_path: Path) -> None:
    options, what = WRONG[case]
    code, out, errors = migrator("reshard", llama, tmp_path / "out", *options)
    assert (code, out, len(errors)) == (2, "", 2), errors
    message, _, hint = what.partition(" | ")
    assert message in errors[0]
    assert errors[1].startswith(f"hint: {hint}")
    assert len(errors[0]) < 500


@pytest.mark.parametrize("option", ["--plan", "--config"])
@pytest.mark.parametrize("leads_to", ["a device", "a pipe"])
def test_a_file_that_is_not_regular_is_neither_read_nor_waited_for(
    option: str, leads_to: str, llama: Path, migrator: Run, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    given = tmp_path / ("plan.json" if option == "--plan" else "config.json")
    given.symlink_to("/dev/zero" if leads_to == "a device" else tmp_path / "pipe")
    code, out, errors = migrator("reshard", llama, tmp_path / "out", *TWO, option, given)
    assert (code, out, len(errors)) == (2, "", 2), errors
    assert f"{given}: not a regular file" in errors[0]


def test_a_config_from_elsewhere_is_read_once(
    llama: Path, hub: Hub, migrator: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").rename(tmp_path / "config.json")

    def then_changed(function: Callable[..., object]) -> Callable[..., object]:
        def called(*arguments: object, **named: object) -> object:
            (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
            return function(*arguments, **named)

        return called

    options = (*TWO, "--config", tmp_path, "--quiet")
    monkeypatch.setattr(execute, "execute_reshard", then_changed(execute.execute_reshard))
    assert migrator("reshard", llama, tmp_path / "out", *options) == (0, "", [])
    assert contents(tmp_path / "out") == contents(hub("llama"))
    monkeypatch.setattr(checkpoint_open, "read_config", then_changed(checkpoint_open.read_config))
    code, _, errors = migrator("reshard", llama, tmp_path / "again", *options)
    assert (code, "'config.json' changed while it was read" in errors[0]) == (2, True)


def test_a_report_needs_no_config_beside_the_files(llama: Path, migrator: Run, tmp_path: Path) -> None:
    (llama / "config.json").rename(tmp_path / "config.json")
    options = (*TWO, "--config", tmp_path, "--report", tmp_path / "page.html")
    for more in (("--dry-run",), ()):
        assert migrator("reshard", llama, tmp_path / "out", *options, *more)[0] == 0
        assert "llama" in (tmp_path / "page.html").read_text("utf-8")


def test_a_repository_is_not_read_by_a_pattern(migrator: Run, tmp_path: Path) -> None:
    code, _, errors = migrator("reshard", "hf://someone/something", tmp_path / "out", *TWO)
    assert (code, "--from-pattern reads a local folder" in errors[0]) == (2, True)


@pytest.mark.parametrize(
    ("cut", "says", "hint"),
    [
        (whole, "is [32, 32], but Shard(1) over tp=2 gives rank 0 [32, 16] of [32, 32]; it looks like Replicate",
         '{"model.layers.*.self_attn.o_proj.weight": {"replicate": true}}'),
        (shard(0), "is [16, 32], but Shard(1) over tp=2 gives rank 0 [32, 16] of [32, 32]; it looks like Shard(0)",
         '{"model.layers.*.self_attn.o_proj.weight": {"shard": 0}}'),
        (lambda tensor, world, rank: tensor[:5, :5], "is [5, 5], but Shard(1) over tp=2 gives rank 0", "--from-tp"),
    ],
)  # fmt: skip
def test_a_shape_that_the_plan_does_not_produce_is_refused_with_a_plan_that_fits(
    cut: Cut, says: str, hint: str, hub: Hub, migrator: Run, tmp_path: Path
) -> None:
    cuts = {r"self_attn\.o_proj\.weight": cut, **TP}
    source = write(tmp_path / "foreign", hub("llama"), state_of(hub("llama")), cuts, tp=2)
    code, _, errors = migrator("reshard", source, tmp_path / "out", *TWO)
    assert code == 2
    assert says in errors[0]
    assert hint in errors[1]
    if "{" in hint:  # What the hint says is what helps.
        (tmp_path / "plan.json").write_text(errors[1].partition("says ")[2])
        assert migrator("reshard", source, tmp_path / "out", *TWO, "--plan", tmp_path / "plan.json", "--quiet")[0] == 0
        assert contents(tmp_path / "out") == contents(hub("llama"))


def test_experts_counted_from_zero_on_every_rank_are_refused(hub: Hub, migrator: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "foreign", hub("qwen3_moe"), stored_in(hub("qwen3_moe")), TP, tp=2, ep=2)
    changed(
        source / "model1-mp2.safetensors",
        lambda tensors: {
            ".".join(str(int(part) - 4) if before == "experts" else part
                     for before, part in zip(["", *name.split(".")], name.split("."), strict=False)): tensor
            for name, tensor in tensors.items()
        },
    )  # fmt: skip
    code, _, errors = migrator("reshard", source, tmp_path / "out", *TWO, "--from-ep", 2)
    assert code == 2
    assert "experts" in errors[0]
    assert not (tmp_path / "out").exists()
