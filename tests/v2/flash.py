"""What stands for FlashAttention on a CPU: its function in torch, behind vLLM's own backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import oracles


@dataclass
class Flash:
    """A FlashAttention of torch.

    Attributes:
        version: of FlashAttention; 2 writes infinity as the log-sum-exp of no scores, 3 minus
            infinity.
        contexts: of each call that attended to a context, what changes from step to step.

    """

    version: int
    contexts: list[dict[str, Tensor]] = field(default_factory=list)

    @torch.inference_mode()
    def attend(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        seqused_k: Tensor,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        block_table: Tensor,
        fa_version: int,
        softcap: float = 0.0,
        window_size: list[int] | None = None,
        return_softmax_lse: bool = False,
        num_splits: int = 0,
        **others: Any,
    ) -> Any:
        """Stand for ``flash_attn_varlen_func`` with a paged cache."""
        assert fa_version == self.version
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
        assert int(seqused_k.max()) <= max_seqlen_k
        assert len(cu_seqlens_q) == len(seqused_k) + 1 == len(block_table) + 1
        assert num_splits == 0
        window = -1 if window_size is None else window_size[0]
        assert causal or window == -1
        for name in ("alibi_slopes", "s_aux", "mask_mod", "dynamic_causal"):
            assert others.get(name) is None
        if not causal:
            assert return_softmax_lse
            assert others.get("scheduler_metadata") is None
            of_step = {"lens": seqused_k, "starts": cu_seqlens_q, "block_table": block_table}
            self.contexts.append({**of_step, "key": k})
        lse = oracles.paged_attention(
            *(q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, softcap),
            is_causal=causal,
            window=window + 1,
        )
        if self.version == 2:
            lse = torch.where(lse.isinf(), -lse, lse)
        return (out, lse) if return_softmax_lse else out


@contextmanager
def flash_attention(version: int) -> Iterator[Flash]:
    """Let the platform choose ``FLASH_ATTN``, and stand for what is compiled for GPUs alone."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from tests.v2.cuda_graphs import as_kernel
    from tests.v2.interpreter import write_cache

    def chosen(cls: Any, *args: Any, **kwargs: Any) -> str:
        return AttentionBackendEnum.FLASH_ATTN.get_path()

    flash = Flash(version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(chosen))
        attend, write = as_kernel(flash.attend), as_kernel(write_cache)
        patch.setattr(flash_attn, "flash_attn_varlen_func", attend, raising=False)
        patch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", attend)
        patch.setattr(flash_attn, "reshape_and_cache_flash", write, raising=False)
        patch.setattr(flash_attn, "get_flash_attn_version", lambda **_: version)
        schedule = torch.zeros(1, dtype=torch.int32)
        patch.setattr(flash_attn, "get_scheduler_metadata", lambda **_: schedule, raising=False)
        yield flash
