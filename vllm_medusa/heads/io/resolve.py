"""From the user's name of a checkpoint (directory, file or hub name) to local files."""

import os
import re
from pathlib import Path

from vllm_medusa.errors import UserError, shown
from vllm_medusa.heads.io.files import TORCH_SUFFIXES, Selector, open_store, read_index

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve(
    name: str | Path, what: str, select: Selector | None, *, revision: str | None = None
) -> Path:
    """Return the local directory or file of a checkpoint, downloading hub repositories.

    From a hub repository only the JSON files and the files that can hold the wanted tensors are
    downloaded: the shards that an index names, else the safetensors files, and torch files only if
    those lack the tensors. Without network, or with `HF_HUB_OFFLINE=1`, the hub's local cache is
    used.

    Args:
        name: existing path, or hub name (`owner/name`).
        what: kind of checkpoint, for messages ("heads").
        select: selects the wanted tensors; None: only JSON files are wanted.
        revision: revision of a hub name.

    Raises:
        UserError: neither an existing path nor an available repository.
    """
    # `os.path`, because `Path` raises where a name is too long or names no user.
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"{what} {shown(str(name))}: no such file or directory; give an existing path or a hub "
            "name such as 'owner/name'"
        )
    try:
        return _download(name, select, revision)
    except UserError:
        raise
    except Exception as exc:  # the hub client raises its own, its HTTP client's and OS errors
        at = "" if revision is None else f" at revision {shown(revision)}"
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise UserError(
            f"{what} {shown(name)}{at}: no such directory, and not found on the hub or in its "
            f"local cache ({type(exc).__name__}: {reason}); check the name, the network and "
            "HF_HUB_OFFLINE, or give a local directory"
        ) from None


def _download(repo: str, select: Selector | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))

    directory = fetch("*.json")
    if select is None:
        return directory
    for index in sorted(directory.glob("*.index.json")):
        file_of = read_index(index)
        if wanted := select(file_of):
            return fetch(*{file_of[key].name for key in wanted})
    directory = fetch("*.safetensors")
    if not any(directory.glob("*.safetensors")):
        return fetch(*(f"*{suffix}" for suffix in TORCH_SUFFIXES))
    if not select(open_store(directory, select).keys):
        return fetch("*.pt")  # heads in a file of their own beside the model
    return directory
