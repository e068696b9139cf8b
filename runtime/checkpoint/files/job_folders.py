"""Where training jobs put the parts of a checkpoint: weights in a subfolder, the config in another folder."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.checkpoint.files.file_names import CONFIG, INDEX, MANIFEST, METADATA, WEIGHTS, find_shard_files
from runtime.checkpoint.files.reading import convert_read_errors

__all__ = ["HUGGINGFACE_FOLDER", "find_config_folder", "find_weights_folder"]

HUGGINGFACE_FOLDER = "huggingface"
"""Where verl keeps config and tokenizer.

Source: `verl.utils.checkpoint.fsdp_checkpoint_manager` of verl 0.5.
"""

_WEIGHTS_FOLDER = re.compile(r"pytorch_model_fsdp_[0-9]{1,4}")
"""Where accelerate, and with it Trainer and axolotl, save the model of an FSDP job as a distributed checkpoint.

Source: `accelerate.utils.fsdp_utils.save_fsdp_model` of accelerate 1.15.
"""


def find_weights_folder(folder: Path) -> Path:
    """Return the folder of the weights: the only one below in which a job saved a model, or the folder itself."""
    with convert_read_errors(folder):
        own = (WEIGHTS, INDEX, MANIFEST, METADATA)
        if not folder.is_dir() or any((folder / name).exists() for name in own) or find_shard_files(folder):
            return folder
        below = [
            path
            for path in folder.iterdir()
            if _WEIGHTS_FOLDER.fullmatch(path.name) and ((path / METADATA).is_file() or find_shard_files(path))
        ]
        return below[0] if len(below) == 1 else folder


def find_config_folder(folder: Path) -> Path:
    """Return where the config of weights is: beside them, where verl puts it, or else in the folder above.

    A job's last save lies beside the folders of its checkpoints, whose config is the same.
    """
    candidates = [folder, folder / HUGGINGFACE_FOLDER, folder.absolute().parent]
    if _WEIGHTS_FOLDER.fullmatch(folder.name):
        candidates.append(folder.absolute().parent.parent)
    return next((candidate for candidate in candidates if (candidate / CONFIG).exists()), folder)
