"""What `migrator prove` and the job step of that name both do: find classes, run their plans, keep what failed."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.exit_codes import ExitCode
from migrator.options.source import read_requests
from migrator.settings import Prove
from plans.errors import DependencyError, MigratorError, UsageError
from plans.mesh import MODES, Mode
from runtime.proving.sizes import Sizes, load_sizes, read_sizes
from runtime.proving.task import FAILURES, FINDINGS, ModeResult, ProofTask, build_mode_mesh

if TYPE_CHECKING:
    from codemods.tree.plan_classes import PlanClass
    from migrator.formats.proof import ProofReport, ProofRow

__all__ = ["Advance", "compute_proof_exit_code", "prove"]

_MIB = 2**20
_UNSAFE = re.compile(r"[^\w.-]+")

Advance = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Job:
    """One class to prove.

    Args:
        plan_class: the class.
        task: what is to be proven of it.
        root: the folder to import it from, None for the installed packages.
    """

    plan_class: PlanClass
    task: ProofTask
    root: Path | None


@dataclass(frozen=True)
class _Work:
    """All that is to be done, and the files that could not be read."""

    jobs: Sequence[_Job]
    sizes: Sizes
    errors: tuple[MigratorError, ...] = ()


def prove(
    settings: Prove,
    advance: Advance = lambda done, total, current: None,
    *,
    changed_only: bool = False,
    base_ref: str | None = None,
) -> ProofReport:
    """Run the plans of a tree's config classes on tiny models.

    Args:
        settings: what to prove.
        advance: called with the modes done, the modes in all, and the class of the last one.
        changed_only: take only classes with a change in their folder, or in that of a file that their plans are from.
        base_ref: the git revision that `changed_only` compares with, None for the default.

    Raises:
        UsageError: the settings contradict each other, or the sizes form no mesh.
        WorkerError: transformers cannot be imported from the tree.
    """
    from migrator.formats.proof import ProofReport, ProofRow

    start = time.perf_counter()
    work = _read_failure(settings.replay) if settings.replay else _find_work(settings, changed_only, base_ref)
    results, versions = _run_jobs(work, settings, advance)
    rows = tuple(ProofRow(job.plan_class, job.task, found) for job, found in zip(work.jobs, results, strict=True))
    modes = tuple(mode for mode in MODES if any(mode in job.task.modes for job in work.jobs))
    saved = tuple(_save_failures(settings.save_failures, work, rows)) if settings.save_failures else ()
    return ProofReport(rows, modes, work.errors, time.perf_counter() - start, saved, versions)


def compute_proof_exit_code(report: ProofReport) -> ExitCode:
    """Return the exit code of a proof."""
    if report.has_failures:
        return ExitCode.FAILED
    return ExitCode.FOUND if report.has_findings else ExitCode.CLEAN


def _find_work(settings: Prove, changed_only: bool, base_ref: str | None) -> _Work:
    modes = _choose_modes(settings)
    sizes = load_sizes().extend(read_sizes(settings.sizes)) if settings.sizes else load_sizes()
    errors: list[MigratorError] = []
    classes = list(_find_classes(settings, changed_only, base_ref, errors))
    ep = settings.tp if settings.ep is None else settings.ep
    base = ProofTask("", "", modes, settings.tp, ep, settings.fsdp, settings.replicate, seed=settings.seed)
    if settings.config is not None:
        fields = _read_object(settings.config, "a config in JSON")
        classes = [_choose_class(classes, fields.get("model_type"), settings.config)]
        base = replace(base, config=fields)
    jobs = [
        _Job(
            one,
            replace(base, module=one.module, class_name=one.name, variant=variant),
            None if settings.installed else one.root,
        )
        for one in classes
        for variant in ("", *(sizes.variants.get(one.name, {}) if settings.config is None else ()))
    ]
    return _Work(jobs, sizes, tuple(errors))


def _choose_modes(settings: Prove) -> tuple[Mode, ...]:
    """Return the modes that were asked for, or else those that the mesh has ranks for.

    Raises:
        UsageError: the sizes do not form a mesh of a mode.
    """
    ep = settings.tp if settings.ep is None else settings.ep
    modes = settings.mode or tuple(mode for mode in MODES if ep > 1 or not mode.endswith("ep"))
    for mode in modes:
        build_mode_mesh(mode, settings.tp, ep, settings.fsdp, settings.replicate)
    return modes


def _find_classes(
    settings: Prove, changed_only: bool, base_ref: str | None, errors: list[MigratorError]
) -> Iterator[PlanClass]:
    from codemods.tree.plan_classes import find_plan_classes

    if settings.installed:
        if settings.paths or changed_only:
            what = "paths" if settings.paths else "`changed_only`"
            raise UsageError(
                f"`installed` takes all of the installed transformers, but {what} was given too",
                hint="leave one of them out",
            )
        found = find_plan_classes([_find_installed_models()], errors=errors)
    else:
        requests = read_requests(settings.paths, changed_only=changed_only, base_ref=base_ref)
        found = [one for request in requests for one in find_plan_classes(request.paths, request.selection, errors)]
    return (one for one in found if one.has_experts or not settings.experts_only)


def _find_installed_models() -> Path:
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise DependencyError(
            "`installed` needs transformers, which is not installed",
            hint="pip install 'plan-migrator[runtime]'",
            packages=["transformers"],
        )
    return Path(spec.origin).parent / "models"


def _choose_class(classes: Sequence[PlanClass], model_type: object, file: Path) -> PlanClass:
    """Return the class of a model type."""
    for one in classes:
        if model_type and one.model_type == model_type:
            return one
    raise UsageError(
        f"{file}: no config class with plans has the model type {model_type!r}",
        hint="set its `model_type`, and name the folder of that model, or `installed`",
        path=str(file),
    )


def _run_jobs(work: _Work, settings: Prove, advance: Advance) -> tuple[list[dict[Mode, ModeResult]], tuple[str, ...]]:
    """Return the results of each job, those of one tree after the other, and the versions of transformers."""
    from runtime.proving.children import ChildSettings, prove_tasks

    results: list[dict[Mode, ModeResult]] = [{} for _ in work.jobs]
    versions: dict[str, None] = {}
    total, done = sum(len(job.task.modes) for job in work.jobs), 0
    advance(0, total, "")
    for root in dict.fromkeys(job.root for job in work.jobs):
        numbers = {job.task.key: number for number, job in enumerate(work.jobs) if job.root == root}

        def report(task: ProofTask, result: ModeResult, numbers: Mapping[tuple[str, str, str], int] = numbers) -> None:
            nonlocal done
            done += 1
            results[numbers[task.key]][result.mode] = result
            advance(done, total, task.name)

        tasks = [work.jobs[number].task for number in numbers.values()]
        limits = ChildSettings(root, work.sizes, settings.timeout, settings.max_memory * _MIB)
        versions[prove_tasks(tasks, limits, report)] = None
    return results, tuple(versions)


def _save_failures(folder: Path, work: _Work, rows: Sequence[ProofRow]) -> Iterator[Path]:
    """Write a file for each mode of a class that is not as it should be, and yield its path."""
    names: Counter[str] = Counter()
    for job, row in zip(work.jobs, rows, strict=True):
        for mode, result in row.results.items():
            if result.outcome not in FINDINGS | FAILURES:
                continue
            name = _UNSAFE.sub("-", f"{job.plan_class.path.parent.name}-{row.task.name}-{mode}")
            names[name] += 1
            file = folder / f"{name}{f'-{names[name]}' if names[name] > 1 else ''}.json"
            document = {
                "path": str(job.plan_class.path),
                "root": None if job.root is None else str(job.root),
                "task": replace(job.task, modes=(mode,)).to_json(),
                "sizes": work.sizes.to_json(),
                "outcome": result.outcome,
                "why": result.why,
            }
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(document, indent=1), "utf-8")
            except OSError as error:
                raise UsageError(
                    f"{file}: cannot be written: {error.strerror}",
                    hint="give `save_failures` a folder that you can write to",
                    path=str(file),
                ) from error
            yield file


def _read_failure(file: Path) -> _Work:
    """Return the work that a file of `_save_failures` repeats."""
    from codemods.tree.plan_classes import find_plan_classes

    document = _read_object(file, "a file that `save_failures` wrote")
    try:
        task, sizes = ProofTask.from_json(document["task"]), Sizes(**document["sizes"])
        path, root = Path(document["path"]), document["root"]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: is not a file that `save_failures` wrote", hint="name one of those", path=str(file)
        ) from error
    errors: list[MigratorError] = []
    found = [one for one in find_plan_classes([path], errors=errors) if one.name == task.class_name]
    if not found:
        raise UsageError(
            f"{file}: {path} has no class {task.class_name} with plans any more",
            hint="prove the tree again",
            path=str(file),
        )
    return _Work([_Job(found[0], task, None if root is None else Path(root))], sizes, tuple(errors))


def _read_object(file: Path, what: str) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}", hint=f"name {what}", path=str(file)) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is not JSON: {error}", hint=f"name {what}", path=str(file)) from error
    if not isinstance(document, dict):
        raise UsageError(f"{file}: is not an object", hint=f"name {what}", path=str(file))
    return document
