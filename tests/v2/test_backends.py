"""Which attention backend a GPU's platform chooses for trees. vLLM asks no GPU for it."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from tests.v2.flashinfer import backend_module
from vllm_medusa.plugin.worker.v2.backends import tree_backends
from vllm_medusa.plugin.worker.v2.triton_backend import TreeTritonBackend

ORDINARY = AttentionSelectorConfig(64, torch.float16, "auto", None)
FLASHINFER = AttentionBackendEnum.FLASHINFER


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's platform of a GPU of compute capability 10."""
    # It imports vLLM's compiled kernels, which a build for CPU does not have.
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("kernels"))
    monkeypatch.delitem(sys.modules, "vllm.platforms.cuda", raising=False)
    platform = import_module("vllm.platforms.cuda").CudaPlatformBase
    monkeypatch.setattr(platform, "get_device_capability", lambda *_: DeviceCapability(10, 0))
    return platform


@pytest.mark.parametrize("major", [8, 9, 10])
def test_flashinfer_is_not_chosen(platform: Any, major: int) -> None:
    with tree_backends(None):
        valid, invalid = platform.get_valid_backends(DeviceCapability(major, 0), ORDINARY)
    assert TreeTritonBackend in [candidate.backend_class for candidate in valid]
    _, (reason,) = invalid[FLASHINFER]
    assert "only if attention_backend names it" in reason


def test_flashinfer_that_the_user_has_set(platform: Any) -> None:
    with backend_module(), tree_backends(FLASHINFER):
        path = platform.get_attn_backend_cls(FLASHINFER, ORDINARY)
    assert path.endswith("TreeFlashInferBackend")


def test_flashinfer_on_other_gpus_is_refused(
    platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "get_device_capability", lambda *_: DeviceCapability(9, 0))
    reason = r"FLASHINFER.*compute capability.*use attention_backend='TRITON_ATTN'"
    with (
        backend_module(),
        tree_backends(FLASHINFER),
        pytest.raises(ValueError, match=reason),
    ):
        platform.get_attn_backend_cls(FLASHINFER, ORDINARY)


@pytest.mark.parametrize("wanted", [FLASHINFER, None])
def test_other_engines_of_the_process_may_have_it(wanted: AttentionBackendEnum | None) -> None:
    before = FLASHINFER.get_path()
    with tree_backends(wanted):
        assert FLASHINFER.get_path() != before
    assert FLASHINFER.get_path() == before
