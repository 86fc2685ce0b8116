"""Writing a target with its heads inside: the merged form of Medusa-2 models."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vllm_medusa.errors import UserError
from vllm_medusa.heads.checkpoint import TREE_FILE, HeadsCheckpoint
from vllm_medusa.heads.io.write import merged_tensors
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.tree.draft_tree import write_tree_file

#: What belongs to a model beside its weights and config.json.
_BESIDE = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "*_tokens*.json",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
)


def save_merged(
    target: FrozenTarget, checkpoint: HeadsCheckpoint, path: Path, beside: Sequence[Path]
) -> None:
    """Write a model directory that holds the target and its heads.

    Args:
        target: finished, in the dtype to write.
        checkpoint: the heads, with their tree.
        path: the directory to make.
        beside: files to copy, see `files_beside`.

    Raises:
        OSError: it cannot be written.
    """
    path.mkdir(parents=True)
    spec, model = checkpoint.spec, target.model
    model.config.medusa_num_heads = spec.num_heads
    model.config.medusa_num_layers = spec.num_layers
    heads = {name: tensor.contiguous() for name, tensor in merged_tensors(checkpoint).items()}
    model.save_pretrained(path, state_dict={**model.state_dict(), **heads})
    for file in beside:
        shutil.copy(file, path / file.name)
    for weights in path.glob("*.safetensors"):
        # safetensors lets the owner alone read its files; others may have to serve them.
        shutil.copymode(path / "config.json", weights)
    if checkpoint.tree_paths is not None:
        write_tree_file(path / TREE_FILE, checkpoint.tree_paths)


def files_beside(source: str, revision: str | None) -> list[Path]:
    """Return the tokenizer's and other files that belong to a model, from the hub if need be.

    Args:
        source: directory or hub name of the model.
        revision: of a hub name.

    Raises:
        UserError: they cannot be had.
    """
    directory = Path(source).expanduser()
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        try:
            fetched = snapshot_download(source, revision=revision, allow_patterns=list(_BESIDE))
        except Exception as exc:  # the hub client raises its own, its HTTP client's and OS errors
            raise UserError(
                f"model {source!r}: its tokenizer is not to be had ({type(exc).__name__}); check "
                "the network, or give a local directory"
            ) from None
        directory = Path(fetched)
    found = {file for pattern in _BESIDE for file in directory.glob(pattern)}
    return sorted(file for file in found if file.is_file())
