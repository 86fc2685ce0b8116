"""What vLLM's own code of Model Runner V2 lacks on a CPU, where Triton's interpreter runs it.

Nothing here touches ours. Each of these stands for code that is there, and needed, on a GPU only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Make up for it, in this process and those that it forks."""
    _keep_asynchronous_scheduling()
    _choose_triton_attention()
    _use_torch_for_top_k_and_top_p()
    _write_cache_without_asking_for_cuda()


def _keep_asynchronous_scheduling() -> None:
    """The CPU platform turns it off (``platforms/cpu.py``)."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        asynchronous = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asynchronous

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _choose_triton_attention() -> None:
    """The CPU platform has one backend and takes no other (``platforms/cpu.py``)."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    original = CpuPlatform.get_attn_backend_cls.__func__
    plain = AttentionBackendEnum.TRITON_ATTN.get_path()

    def get_attn_backend_cls(cls: Any, *args: Any, **kwargs: Any) -> str:
        path = AttentionBackendEnum.TRITON_ATTN.get_path()
        return original(cls, *args, **kwargs) if path == plain else path

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _use_torch_for_top_k_and_top_p() -> None:
    """vLLM's kernel uses what the interpreter does not have."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
    from vllm.v1.worker.gpu.sample import sampler, states

    def apply(logits: Tensor, k: Tensor | None, p: Tensor | None, **_: Any) -> Tensor:
        return apply_top_k_top_p_pytorch(logits, k, p)

    sampler.apply_top_k_top_p = states.apply_top_k_top_p = apply


def _write_cache_without_asking_for_cuda() -> None:
    """Launching the kernel that writes the cache asks for the GPU's capability."""
    from vllm.v1.attention.backends import triton_attn

    triton_attn.triton_reshape_and_cache_flash = write_cache


def write_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Stand for vLLM's ``reshape_and_cache_flash``."""
    slots = slot_mapping[: key.shape[0]]
    is_used = slots >= 0
    page, inside = slots[is_used] // key_cache.shape[1], slots[is_used] % key_cache.shape[1]
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        values = new[: len(is_used)][is_used]
        if cache.dtype.itemsize == 1:
            values = values / scale
        cache[page, inside] = values.to(cache.dtype)


def attend_with_torch() -> Any:
    """Return what stands for the attention kernel where a test is about something else.

    The interpreter takes most of its time for attention.
    """
    from tests.kernels import oracles

    return torch.inference_mode()(oracles.attention)
