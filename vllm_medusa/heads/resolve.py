"""From what the user wrote (directory, file or hub name) to a local path."""

import re
from pathlib import Path

from vllm_medusa.heads.errors import HeadsError
from vllm_medusa.heads.files import TORCH_SUFFIXES, open_store, read_index
from vllm_medusa.heads.formats import has_heads, head_names

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve_heads(name: str | Path, *, revision: str | None = None) -> Path:
    """Return the local directory or file of the heads, downloading hub repositories.

    Of a hub repository only the JSON files and the files that may hold heads are downloaded: the
    shards that an index names, else the safetensors files, and torch files only if those hold no
    heads. Without network, or with `HF_HUB_OFFLINE=1`, the hub's local cache is used.

    Raises:
        HeadsError: neither an existing path nor a repository that can be had.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        raise HeadsError(
            f"heads {str(name)!r}: no such file or directory; give an existing path or a hub name "
            "such as 'owner/name'"
        )
    try:
        return _download(name, revision)
    except HeadsError:
        raise
    except Exception as exc:  # the hub client raises its own, its HTTP client's and OS errors
        at = "" if revision is None else f" at revision {revision!r}"
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise HeadsError(
            f"heads {name!r}{at}: no such directory, and not to be had from the hub or its local "
            f"cache ({type(exc).__name__}: {reason}); check the name, the network and "
            "HF_HUB_OFFLINE, or give a local directory"
        ) from None


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))

    directory = fetch("*.json")
    for index in sorted(directory.glob("*.index.json")):
        file_of = read_index(index)
        if has_heads(file_of):
            return fetch(*{file_of[key].name for key in head_names(file_of).values()})
    directory = fetch("*.safetensors")
    if not any(directory.glob("*.safetensors")):
        return fetch(*(f"*{suffix}" for suffix in TORCH_SUFFIXES))
    if not has_heads(open_store(directory, has_heads).keys()):
        return fetch("*.pt")  # heads in a file of their own beside the model
    return directory
