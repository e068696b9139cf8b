"""A validation's request, with its JSON form, and the mesh that a checkpoint was written for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plans.errors import UsageError
from plans.mesh import Mesh, Mode
from runtime.checkpoint.manifest import Manifest, find_manifest

__all__ = ["Device", "Ranks", "ValidationRequest", "check_mesh", "resolve_mesh"]

Device = Literal["cpu", "cuda", "auto"]
Ranks = Literal["auto", "processes", "threads"]


@dataclass(frozen=True)
class ValidationRequest:
    """The settings of one validation.

    Args:
        folder: the checkpoint's folder, of any layout.
        mesh: the mesh to load it onto; the one it was written for, if it records one.
        mode: which of the model's plans apply.
        reference: a checkpoint of the same model, of any layout; None reassembles the folder itself.
        device: where ranks compute; `auto` uses GPUs if each rank on the machine can have one.
        tolerance: the accepted difference of outputs, relative to the reference's largest, in (0, 1); None for that of
            the precision in which the models are compared.
        timeout: seconds that the workers may take.
        batch: rows of tokens.
        sequence: tokens in a row, rounded up to a multiple of the tensor parallel axis.
        new_tokens: tokens generated for each row.
        seed: the seed of the tokens.
        plan: key to style, to use instead of the model's plans; None for these.
        allow_unexercised: names or patterns (`*` matches anything) of what need not be exercised for a proof.
        ranks: what ranks are; `auto` takes processes where each can have a processor, or a GPU, and threads elsewhere.
        follow_links: read links that lead out of the folders.
        by_block: compare the models block by block even where both fit in memory whole.
        digests: a file with the digests of the checkpoint, None to go by its manifest.
    """

    folder: Path
    mesh: Mesh = field(default_factory=Mesh)
    mode: Mode = "tp"
    reference: Path | None = None
    device: Device = "cpu"
    tolerance: float | None = None
    timeout: float = 1800.0
    batch: int = 2
    sequence: int = 16
    new_tokens: int = 8
    seed: int = 0
    plan: Mapping[str, str] | None = None
    allow_unexercised: tuple[str, ...] = ()
    ranks: Ranks = "auto"
    follow_links: bool = False
    by_block: bool = False
    digests: Path | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise UsageError(
                f"tolerance must be between 0 and 1, relative to the largest output, got {self.tolerance}",
                hint="pass a value such as 1e-5",
                tolerance=self.tolerance,
            )
        if self.by_block and self.mesh.pp > 1:
            raise UsageError(
                f"pp={self.mesh.pp} stages are not compared block by block: their blocks are on different ranks",
                hint="leave `by_block` out, or reshard without `pp`",
                pp=self.mesh.pp,
            )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, with absolute paths."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "folder": str(self.folder.absolute()),
            "mesh": self.mesh.axis_sizes,
            "reference": str(self.reference.absolute()) if self.reference else None,
            "digests": str(self.digests.absolute()) if self.digests else None,
            "plan": None if self.plan is None else dict(self.plan),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ValidationRequest:
        """Read the JSON form that the parent process wrote."""
        reference = value["reference"]
        return cls(
            **{
                **value,
                "folder": Path(value["folder"]),
                "mesh": Mesh(**value["mesh"]),
                "reference": Path(reference) if reference else None,
                "digests": Path(value["digests"]) if value["digests"] else None,
                "allow_unexercised": tuple(value["allow_unexercised"]),
            }
        )


def resolve_mesh(folder: Path, sizes: Mapping[str, int], mode: Mode | None) -> tuple[Mesh, Mode]:
    """Return the mesh and mode to validate on: those that the checkpoint was written for, else the requested ones.

    Args:
        folder: the checkpoint's folder.
        sizes: the requested sizes of mesh axes by name; the others may be any.
        mode: the requested mode, None if any will do.

    Raises:
        UsageError: the checkpoint was written for another mesh or mode, or the sizes do not form a mesh.
        HeaderError: its manifest is damaged.
    """
    manifest = find_manifest(folder)
    if manifest is None:
        mesh = Mesh(**sizes)
        return mesh, mode or ("tp_ep" if mesh.ep > 1 else "tp")
    recorded = manifest.mesh.axis_sizes
    if any(recorded[axis] != size for axis, size in sizes.items()) or mode not in (None, manifest.mode):
        requested = [f"`{axis}={size}`" for axis, size in sizes.items()] + ([f"`mode={mode}`"] if mode else [])
        raise _mesh_mismatch_error(folder, manifest, " ".join(requested))
    return manifest.mesh, manifest.mode


def check_mesh(request: ValidationRequest) -> Manifest | None:
    """Return the manifest of a request's checkpoint, None if it has none.

    Raises:
        UsageError: the checkpoint was written for another mesh or mode than the request's.
        HeaderError: its manifest is damaged.
    """
    manifest = find_manifest(request.folder)
    if manifest is not None and (manifest.mesh, manifest.mode) != (request.mesh, request.mode):
        raise _mesh_mismatch_error(request.folder, manifest, _format_mesh(request.mesh, request.mode))
    return manifest


def _mesh_mismatch_error(folder: Path, manifest: Manifest, requested: str) -> UsageError:
    recorded = _format_mesh(manifest.mesh, manifest.mode)
    return UsageError(
        f"{folder} was written for {recorded}, not {requested}",
        hint=f"leave the mesh out, pass {recorded}, or reshard the checkpoint",
        mesh=manifest.mesh.to_json(),
        mode=manifest.mode,
    )


def _format_mesh(mesh: Mesh, mode: Mode) -> str:
    axes = [f"`{axis}={size}`" for axis, size in mesh.axis_sizes.items() if size > 1 or axis == "tp"]
    return " ".join(axes + ([f"`mode={mode}`"] if mode != ("tp_ep" if mesh.ep > 1 else "tp") else []))
