"""Finds the files that hold tensors, and reads single tensors from them.

Nothing here depends on the names of Medusa heads. `TensorStore` is a lazy `key -> tensor` view of
the safetensors or torch files of one directory. Tensors are memory-mapped: from a merged model with
seven billion parameters only the headers and the heads are read. Torch files from before PyTorch
1.6 are not zip archives and are read completely.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from vllm_medusa.errors import UserError

Selector = Callable[[Iterable[str]], Collection[str]]
"""Selects, from the names of all tensors of a checkpoint, those that are wanted."""

TORCH_SUFFIXES = (".pt", ".bin", ".pth")
# Pickles that trainers leave beside the weights; they hold no weights and are never opened.
TRAINER_FILES = frozenset(
    {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}
)


class TensorFile(Protocol):
    """One open file of named tensors."""

    @property
    def keys(self) -> Collection[str]:
        """The tensors' names."""

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor, memory-mapped: its values are read where they are used."""


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        handle = self._mapped()
        stored = set(handle.keys())
        # safetensors.torch.save_model drops a tensor that shares memory with another one and notes
        # "dropped name: kept name" in the metadata. Heads whose layers are tied (the reference
        # repeats one residual block object) come out that way.
        metadata = handle.metadata() or {}
        self._aliases = {
            name: kept for name, kept in metadata.items() if name not in stored and kept in stored
        }
        self.keys = sorted(stored | self._aliases.keys())

    def read(self, key: str) -> torch.Tensor:
        # Mapped again for each tensor, so that its pages are freed together with it.
        tensor: torch.Tensor = self._mapped().get_tensor(self._aliases.get(key, key))
        return tensor

    def _mapped(self) -> Any:
        try:
            return safe_open(self._path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as exc:
            raise UserError(
                f"{self._path}: not a readable safetensors file ({exc}); it is truncated or "
                "damaged, copy or download it again"
            ) from None


class _TorchFile:
    def __init__(self, path: Path) -> None:
        state = _torch_load(path)
        if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
        ):
            raise UserError(
                f"{path}: holds something other than a flat dictionary of tensors; save the heads "
                "with torch.save(heads.state_dict(), ...) or as safetensors"
            )
        self._state: dict[str, torch.Tensor] = state
        self.keys = self._state.keys()

    def read(self, key: str) -> torch.Tensor:
        return self._state[key].detach()


def _torch_load(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    damaged = UserError(
        f"{path}: not a readable torch file; it is truncated or damaged, copy or download it again"
    )
    if is_zip and not zipfile.is_zipfile(path):
        raise damaged
    try:
        # Only the zip format can be memory-mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as exc:
        if "GLOBAL" not in str(exc):  # what a pickle calls a class or function
            raise damaged from None
        raise UserError(
            f"{path}: holds pickled code or objects, which are never executed; save the heads "
            "again as safetensors or as a state_dict of tensors"
        ) from None
    except Exception:  # which error torch raises depends on where the bytes end
        raise damaged from None


def open_tensor_file(path: Path) -> TensorFile:
    """Open one file by its suffix.

    Raises:
        UserError: unknown suffix, truncated or damaged file, or pickled code.
    """
    if path.suffix == ".safetensors":
        return _SafetensorsFile(path)
    if path.suffix in TORCH_SUFFIXES:
        return _TorchFile(path)
    raise UserError(
        f"{path}: unknown kind of weights file; use .safetensors, {', '.join(TORCH_SUFFIXES)}, "
        "or the directory that holds one"
    )


class TensorStore:
    """Lazy view of the named tensors of one or several files.

    Args:
        location: the file or directory, for messages.
        file_of: the file that holds each key.
        opened: files that are open already; the others are opened when first read.
    """

    def __init__(
        self, location: Path, file_of: Mapping[str, Path], opened: Mapping[Path, TensorFile]
    ) -> None:
        self.location = location
        self._file_of = file_of
        self._open = dict(opened)

    @property
    def keys(self) -> Collection[str]:
        """The tensors' names."""
        return self._file_of.keys()

    def file_of(self, key: str) -> Path:
        """Return the file that holds a tensor."""
        return self._file_of[key]

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor, memory-mapped: its values are read where they are used.

        Raises:
            UserError: the file is missing or damaged, or lacks a tensor that the index promised.
        """
        path = self._file_of[key]
        if path not in self._open:
            if not path.is_file():
                raise UserError(
                    f"{path}: the shard that holds tensor {key!r} is missing; copy or download it"
                )
            self._open[path] = open_tensor_file(path)
        if key not in self._open[path].keys:
            raise UserError(
                f"{path}: tensor {key!r} is missing although the index beside the file lists it; "
                "copy or download the checkpoint again"
            )
        return self._open[path].read(key)


def open_store(location: Path, select: Selector) -> TensorStore:
    """Open the weights of a directory or of a single file.

    In a directory, safetensors files are preferred to torch files, as in vLLM, unless only the
    torch files hold the wanted tensors. Where an index lists the tensors of shards, unread shards
    are not opened.

    Args:
        location: an existing file or directory.
        select: selects the wanted tensors.

    Raises:
        UserError: no weights files, an unreadable file or index, or one key in two files.
    """
    if location.is_file():
        file = open_tensor_file(location)
        return TensorStore(location, dict.fromkeys(file.keys, location), {location: file})
    store: TensorStore | None = None
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        file_of, opened = _file_of_keys(location, suffixes)
        if select(file_of):
            return TensorStore(location, file_of, opened)
        if file_of and store is None:
            store = TensorStore(location, file_of, opened)
    if store is None:
        raise UserError(
            f"{location}: no weights file (*.safetensors, *{', *'.join(TORCH_SUFFIXES)}) in this "
            "directory; give the directory or file that holds the weights"
        )
    return store


def _file_of_keys(
    directory: Path, suffixes: tuple[str, ...]
) -> tuple[dict[str, Path], dict[Path, TensorFile]]:
    """The file that holds each tensor, and the files that had to be opened to tell."""
    file_of: dict[str, Path] = {}
    opened: dict[Path, TensorFile] = {}
    for index in sorted(directory.glob("*.index.json")):
        if Path(index.name.removesuffix(".index.json")).suffix in suffixes:
            file_of |= read_index(index)
    indexed = set(file_of.values())
    indexed_keys = set(file_of)
    for path in sorted(directory.iterdir()):
        if path.suffix not in suffixes or path.name in TRAINER_FILES or path in indexed:
            continue
        opened[path] = open_tensor_file(path)
        for key in opened[path].keys:
            if key in indexed_keys:
                continue  # the index decides, as in vLLM: the file is a second, consolidated copy
            if key in file_of:
                raise UserError(
                    f"tensor {key!r} is in both {file_of[key]} and {path}; remove one of the files"
                )
            file_of[key] = path
    return file_of, opened


def read_index(path: Path) -> dict[str, Path]:
    """Read the index of sharded weights: which file beside it holds each tensor.

    Raises:
        UserError: it is not such an index.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise UserError(f"{path}: no 'weight_map' of tensor names to files; repair the index")
    return {key: path.parent / file for key, file in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: unreadable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise UserError(f"{path}: not readable as JSON ({exc}); repair the file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; repair the file")
    return content
