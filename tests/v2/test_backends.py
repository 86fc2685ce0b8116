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
def test_flashinfer_is_left_out(platform: Any, major: int) -> None:
    with tree_backends():
        valid, invalid = platform.get_valid_backends(DeviceCapability(major, 0), ORDINARY)
    assert TreeTritonBackend in [candidate.backend_class for candidate in valid]
    _, (reason,) = invalid[FLASHINFER]
    assert "no attention to draft trees" in reason


def test_flashinfer_that_the_user_has_set_is_refused(platform: Any) -> None:
    with (
        tree_backends(),
        pytest.raises(ValueError, match=r"FLASHINFER.*trees; use attention_backend='TRITON_ATTN'"),
    ):
        platform.get_attn_backend_cls(FLASHINFER, ORDINARY)


def test_other_engines_of_the_process_may_have_it() -> None:
    before = FLASHINFER.get_path()
    with tree_backends():
        assert FLASHINFER.get_path() != before
    assert FLASHINFER.get_path() == before
