"""Hub names: what is downloaded, with a stand-in for the hub's client that copies files."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.checkpoints import (
    assert_same_heads,
    backbone_tensors,
    make_heads,
    sequential_tensors,
    write,
    write_fasterdecoding,
    write_modelopt,
    write_vllm,
)
from vllm_medusa.errors import UserError
from vllm_medusa.heads import load_heads
from vllm_medusa.target.config import read_lm_head, read_target

REPO = "owner/name"


class Hub:
    """Serves one repository; `fetched` tells which files were asked for."""

    def __init__(self, tmp_path: Path) -> None:
        self.remote = tmp_path / "remote"
        self.remote.mkdir()
        self.local = tmp_path / "local"
        self.local.mkdir()
        self.revisions: set[str | None] = set()

    def snapshot_download(
        self, repo: str, *, revision: str | None, allow_patterns: list[str]
    ) -> str:
        assert repo == REPO
        self.revisions.add(revision)
        for path in self.remote.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, self.local)
        return str(self.local)

    @property
    def fetched(self) -> set[str]:
        return {path.name for path in self.local.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_torch_files_if_there_are_no_others(hub: Hub) -> None:
    write_fasterdecoding(hub.remote, make_heads())
    (hub.remote / "README.md").write_text("")
    loaded = load_heads(REPO, revision="v1")
    assert_same_heads(loaded, make_heads(), source_format="fasterdecoding")
    assert hub.fetched == {"config.json", "medusa_lm_head.pt"}
    assert hub.revisions == {"v1"}


def test_safetensors_only_if_they_hold_the_heads(hub: Hub) -> None:
    write_vllm(hub.remote, make_heads())
    torch.save({}, hub.remote / "pytorch_model.bin")
    assert_same_heads(load_heads(REPO), make_heads(), source_format="vllm")
    assert hub.fetched == {"config.json", "model.safetensors"}


def test_of_a_sharded_model_only_the_shards_with_heads(hub: Hub) -> None:
    write_modelopt(hub.remote, make_heads(), num_shards=5)
    assert_same_heads(load_heads(REPO), make_heads(), source_format="modelopt")
    assert "model-00001-of-00005.safetensors" not in hub.fetched
    assert "model-00005-of-00005.safetensors" in hub.fetched


def test_heads_in_a_torch_file_beside_a_safetensors_model(hub: Hub) -> None:
    write(hub.remote, backbone_tensors(), {"hidden_size": 8}, "model.safetensors")
    torch.save(sequential_tensors(make_heads()), hub.remote / "medusa_lm_head.pt")
    assert_same_heads(load_heads(REPO), make_heads(), source_format="fasterdecoding")


def test_target_downloads_weights_only_for_its_lm_head(hub: Hub) -> None:
    write_modelopt(hub.remote, make_heads(), num_shards=5)
    target = read_target(REPO)
    assert (target.hidden_size, target.vocab_size) == (8, 20)
    assert hub.fetched == {"config.json", "model.safetensors.index.json"}
    assert torch.equal(read_lm_head(target), torch.ones(20, 8))
    assert "model-00005-of-00005.safetensors" not in hub.fetched


def test_existing_path_goes_before_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_vllm(tmp_path / "owner" / "name", make_heads())
    assert_same_heads(load_heads(REPO), make_heads(), source_format="vllm")
    assert hub.fetched == set()


@pytest.mark.parametrize(
    "failure",
    [
        LocalEntryNotFoundError("no such snapshot,\nand more lines"),
        OSError("network is unreachable"),
        ValueError(""),
    ],
)
def test_what_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        load_heads(REPO, revision="main")
    message = str(caught.value)
    assert message.startswith("heads 'owner/name' at revision 'main': no such directory")
    assert type(failure).__name__ in message
    assert "and more lines" not in message
    assert "HF_HUB_OFFLINE" in message


def test_offline_for_real() -> None:
    """conftest.py sets HF_HUB_OFFLINE: the real client, no network, no cache."""
    with pytest.raises(UserError, match="no such directory, and not found on the hub"):
        load_heads("nobody-has-this/repository")


@pytest.mark.parametrize(
    "name", ["/etc/nothing", "./nothing", "a/b/c", "a b/c", "../x/y", "~/nope"]
)
def test_paths_are_no_hub_names(hub: Hub, name: str) -> None:
    with pytest.raises(UserError, match="no such file or directory; give an existing path"):
        load_heads(name)
    assert hub.fetched == set()
