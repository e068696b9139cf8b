"""Families of transformers, tiny: to rank files and back byte for byte, and validated on two ranks.

Each is made by transformers' own config class, saved by `save_pretrained`, resharded to one file per rank and back to
hub form, all files compared, and validated against the saved one: tensor parallel where its class has such a plan, else
data parallel. Written as docs/families.md. Ends with 1 where files differ or a validation finds something wrong.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import multiprocessing

from migrator.actions import plan_reshard, reshard
from migrator.settings import Reshard
from plans.errors import MigratorError, MissingPlanError
from plans.mesh import Mesh
from plans.plan import to_wildcard
from plans.text import format_names
from runtime.planning.plan import get_released_plan
from runtime.proving.prove import describe_error
from runtime.proving.tiny_model import tiny_config, tiny_model
from runtime.validation.request import ValidationRequest
from runtime.validation.results import ValidationResult
from runtime.validation.validate import validate
from tests.runtime.checkpoint.hub.tiny_types import tiny_type
from tests.runtime.checks import wrong_entry_cases
from tests.tiny_models import DENSE, with_noise

__all__ = ["FAMILIES", "Row", "run_family"]

REPORT = Path(__file__).parent.parent / "docs" / "families.md"
RANKS = 2
SECONDS = 300.0

TEXT_FAMILIES: tuple[tuple[str, str], ...] = (
    ("afmoe", "AfmoeConfig"),
    ("apertus", "ApertusConfig"),
    ("aria", "AriaTextConfig"),
    ("bailing_hybrid", "BailingHybridConfig"),
    ("bloom", "BloomConfig"),
    ("cohere2_moe", "Cohere2MoeConfig"),
    ("deepseek_v2", "DeepseekV2Config"),
    ("deepseek_v3", "DeepseekV3Config"),
    ("dots1", "Dots1Config"),
    ("ernie4_5_moe", "Ernie4_5_MoeConfig"),
    ("exaone_moe", "ExaoneMoeConfig"),
    ("flex_olmo", "FlexOlmoConfig"),
    ("gemma2", "Gemma2Config"),
    ("gemma3", "Gemma3TextConfig"),
    ("glm4_moe", "Glm4MoeConfig"),
    ("glm4_moe_lite", "Glm4MoeLiteConfig"),
    ("gpt_oss", "GptOssConfig"),
    ("granitemoe", "GraniteMoeConfig"),
    ("hy_v3", "HYV3Config"),
    ("inkling", "InklingTextConfig"),
    ("jamba", "JambaConfig"),
    ("laguna", "LagunaConfig"),
    ("llama", "LlamaConfig"),
    ("longcat_flash", "LongcatFlashConfig"),
    ("mamba", "MambaConfig"),
    ("mellum", "MellumConfig"),
    ("minimax_m2", "MiniMaxM2Config"),
    ("mistral", "MistralConfig"),
    ("mixtral", "MixtralConfig"),
    ("nemotron_h", "NemotronHConfig"),
    ("olmo2", "Olmo2Config"),
    ("olmoe", "OlmoeConfig"),
    ("opt", "OPTConfig"),
    ("phi3", "Phi3Config"),
    ("phimoe", "PhimoeConfig"),
    ("qwen2_moe", "Qwen2MoeConfig"),
    ("qwen3", "Qwen3Config"),
    ("qwen3_moe", "Qwen3MoeConfig"),
    ("qwen3_next", "Qwen3NextConfig"),
    ("solar_open", "SolarOpenConfig"),
)
"""Folder and config class of families of text models."""

COMPOSITE_FAMILIES = ("gemma3", "gemma4", "glm4v_moe", "internvl", "llama4", "llava", "mistral3", "qwen3_vl_moe")
"""Model types with models of other kinds inside."""

FAMILIES = (*(class_name for _, class_name in TEXT_FAMILIES), *COMPOSITE_FAMILIES)

INTRODUCTION = """\
# Families, there and back, and validated

`make families` wrote this page, with transformers {version}. Each row is a tiny model of the family, made by its own
config class and saved by `save_pretrained`; then `migrator reshard` to one file per rank and back to hub form, every
file compared byte for byte; then `migrator validate` of the rank files against the saved model. Models whose classes
have no tensor parallel plan run data parallel.

{counts}

| family | ranks | there and back | validate |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What became of one family.

    Args:
        family: its config class or model type.
        mesh: the mesh.
        back: what became of the files.
        outcome: `proven`, `not fully proven`, `not proven`, `failed` where the model does not run, `refused` or
            `not built`.
        why: the names or the reason, if there are any.
    """

    family: str
    mesh: str
    back: str
    outcome: str
    why: str = ""


def run_family(family: str, folder: Path) -> Row:
    """Run a family on the ranks of the process group; each rank calls this with the same folder."""
    hub, ranks, back = (folder / name for name in ("hub", "ranks", "back"))
    prepared = _share(lambda: _prepare(family, hub, ranks, back))
    if isinstance(prepared, Row):
        return prepared
    mesh, files = prepared
    try:
        result = validate(ValidationRequest(ranks, mesh, reference=hub, timeout=SECONDS))
    except MigratorError as error:
        return Row(family, str(mesh), files, "refused", f"{error.message}; {error.hint}".replace(f"{folder}/", ""))
    outcome = "failed" if result.failed and not result.is_wrong else result.verdict
    return Row(family, str(mesh), files, outcome, _describe(result))


def _share(prepare: Callable[[], Row | tuple[Mesh, str]]) -> Row | tuple[Mesh, str]:
    """Return what rank 0 prepares."""
    found = [prepare() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _prepare(family: str, hub: Path, ranks: Path, back: Path) -> Row | tuple[Mesh, str]:
    """Build, save and reshard a family; return the mesh and what became of the files, or the row if that is its end."""
    try:
        model = _build_model(family)
        model.save_pretrained(hub)
    except Exception as error:  # What models raise is not ours to list.
        return Row(family, "", "", "not built", describe_error(error))
    try:
        get_released_plan(model)
        mesh = Mesh(tp=RANKS)
    except MissingPlanError:
        mesh = Mesh(fsdp=RANKS)
    try:
        _reshard(Reshard(str(hub), ranks, tp=mesh.tp, fsdp=mesh.fsdp, layout="ranks"))
        _reshard(Reshard(str(ranks), back, layout="hf"))
    except MigratorError as error:
        return Row(family, str(mesh), "", "refused", f"{error.message}; {error.hint}".replace(f"{hub.parent}/", ""))
    return mesh, _compare_files(hub, back)


def _build_model(family: str) -> transformers.PreTrainedModel:
    """Build a family's tiny model, in float32, with random weights."""
    folder = {class_name: folder for folder, class_name in TEXT_FAMILIES}.get(family)
    if folder is not None:
        return tiny_model(tiny_config(f"transformers.models.{folder}.configuration_{folder}", family), torch.float32)
    if family == "gemma4":
        return with_noise(transformers.Gemma4ForConditionalGeneration(_build_gemma_4_config()))
    if family == "llama4":
        return wrong_entry_cases.composite(family)  # type: ignore[no-any-return]
    model = tiny_type(family).float()
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_((0.1 if tensor.ndim > 1 else 0.05) * torch.randn(tensor.shape))
            tensor.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def _build_gemma_4_config() -> transformers.PreTrainedConfig:
    """Return the config of a Gemma 4 with a vision tower, whose embedding is tied to the head."""
    heads = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2}
    sizes = {"vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 4, "sliding_window": 8}
    layers = ["sliding_attention", "full_attention", "full_attention"]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "position_embedding_size": 16}
    vision_heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    tokens = {"image_token_id": 95, "boi_token_id": 96, "eoi_token_id": 97, "boa_token_id": 98, "audio_token_id": 94}
    return transformers.Gemma4Config(
        text_config={**DENSE, **heads, **sizes, "layer_types": layers},
        vision_config=vision | vision_heads,
        eoa_token_index=99,
        video_token_id=93,
        **tokens,
    )


def _reshard(settings: Reshard) -> None:
    reshard(plan_reshard(settings, None), settings, lambda *_: None, lambda _: None)


def _compare_files(expected: Path, found: Path) -> str:
    """Return how the files of two folders differ, or how many are equal."""
    names = sorted({path.name for folder in (expected, found) for path in folder.iterdir()} - {"migrator.json"})
    differing = [
        name
        for name in names
        if not ((expected / name).is_file() and (found / name).is_file())
        or (expected / name).read_bytes() != (found / name).read_bytes()
    ]
    return f"differ: {format_names(differing)}" if differing else f"{len(names)} files equal"


def _describe(result: ValidationResult) -> str:
    """Return what a validation did not exercise, found wrong or could not run, in one line."""
    names: dict[str, dict[str, None]] = {}
    for row in result.unexercised:
        names.setdefault(row.reason, {}).setdefault(to_wildcard(row.name))
    gaps = [f"{reason}: {format_names(list(keys))}" for reason, keys in names.items()]
    wrong = [f"{part}: {check.mismatches[0]}" for part, check in result.checks.items() if check.mismatches]
    failed = [f"{part}: {reason}" for part, reason in (*result.failed.items(), *result.skipped.items())]
    return "; ".join([*wrong, *failed, *gaps])


def main(names: Sequence[str]) -> int:
    """Run the families, write the report, and return the exit code."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        multiprocessing.spawn(_serve, (folder, tuple(names or FAMILIES)), nprocs=RANKS)
        rows = [Row(**row) for row in json.loads((Path(folder) / "rows.json").read_text("utf-8"))]
    if not names:
        REPORT.write_text("\n".join(_write_report(rows)) + "\n", "utf-8")
    print(f"{len(rows)} families in {time.perf_counter() - start:.0f} s")
    return (
        1
        if any(row.outcome in ("not proven", "failed", "not built") or row.back.startswith("differ") for row in rows)
        else 0
    )


def _serve(rank: int, folder: str, families: Sequence[str]) -> None:
    """Run all families on one rank; rank 0 prints each row and writes them all down."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    rows: list[Row] = []
    for number, family in enumerate(families):
        own = Path(folder) / str(number)
        rows.append(run_family(family, own))
        if rank == 0:
            print(_format(rows[-1]), flush=True)
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps([vars(row) for row in rows]), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _write_report(rows: Sequence[Row]) -> Iterator[str]:
    counts = Counter(row.outcome for row in rows)
    facts = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    yield INTRODUCTION.format(version=version("transformers"), counts=f"{len(rows)} rows: {facts}.").rstrip("\n")
    yield from map(_format, rows)


def _format(row: Row) -> str:
    outcome = f"{row.outcome}: {row.why}" if row.why else row.outcome
    return f"| {row.family} | {row.mesh} | {row.back} | {outcome.replace('|', '/')} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
