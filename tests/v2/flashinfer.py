"""What stands for FlashInfer on a CPU: its trtllm-gen kernels in torch, behind vLLM's backend."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import oracles

_BACKEND = "vllm.v1.attention.backends.flashinfer"


@dataclass
class FlashInfer:
    """A FlashInfer of torch.

    Attributes:
        contexts: of each call that attended to a context, what changes from step to step.
        num_causal: number of calls for prompts, and for steps without drafts.

    """

    contexts: list[dict[str, Tensor]] = field(default_factory=list)
    num_causal: dict[str, int] = field(default_factory=lambda: {"prompts": 0, "decodes": 0})

    @torch.inference_mode()
    def attend(
        self,
        *,
        query: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        workspace_buffer: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        max_q_len: int,
        max_kv_len: int,
        bmm1_scale: float,
        bmm2_scale: float,
        batch_size: int,
        cum_seq_lens_q: Tensor,
        cum_seq_lens_kv: Tensor,
        out: Tensor,
        window_left: int = -1,
        causal: bool = True,
        lse: Tensor | None = None,
        return_lse: bool = False,
        **others: Any,
    ) -> Any:
        """Stand for ``trtllm_batch_context_with_kv_cache``."""
        assert batch_size == len(seq_lens) == len(block_tables) == len(cum_seq_lens_q) - 1
        assert int(cum_seq_lens_q.diff().max()) <= max_q_len
        assert int(seq_lens.max()) <= max_kv_len
        assert bmm2_scale == 1
        assert others.get("sinks") is None
        key, value = (cache.transpose(1, 2) for cache in kv_cache)
        blocks = -(-seq_lens // key.shape[1])
        assert cum_seq_lens_kv.tolist() == [0, *blocks.cumsum(0).tolist()]
        if causal:
            self.num_causal["prompts"] += 1
        else:
            assert return_lse
            assert window_left == -1
            of_step = {"lens": seq_lens, "starts": cum_seq_lens_q, "block_table": block_tables}
            self.contexts.append({**of_step, "key": key})
        found = torch.empty_like(out)
        sums = oracles.paged_attention(
            *(query, key, value, found, cum_seq_lens_q, seq_lens, block_tables, bmm1_scale),
            is_causal=causal,
            window=window_left + 1,
        ).T
        # Nothing is written for a request without keys.
        has_keys = sums[:, 0] > -torch.inf
        out[has_keys] = found[has_keys]
        if return_lse:
            assert lse is not None
            lse[has_keys] = sums[has_keys] / torch.log(torch.tensor(2.0))
        return (out, lse) if return_lse else out

    @torch.inference_mode()
    def decode(
        self,
        *,
        query: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        block_tables: Tensor,
        seq_lens: Tensor,
        bmm1_scale: float,
        q_len_per_req: int,
        out: Tensor,
        window_left: int = -1,
        **_: Any,
    ) -> Tensor:
        """Stand for ``trtllm_batch_decode_with_kv_cache``."""
        self.num_causal["decodes"] += 1
        key, value = (cache.transpose(1, 2) for cache in kv_cache)
        starts = torch.arange(len(seq_lens) + 1) * q_len_per_req
        oracles.paged_attention(
            *(query, key, value, out, starts, seq_lens, block_tables, bmm1_scale),
            is_causal=True,
            window=window_left + 1,
        )
        return out


def without_sums(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Return an older kernel, that of a FlashInfer for vLLM 0.32: it returns no sums."""

    def older(*, query: Tensor, **others: Any) -> Any:
        assert not others.keys() & {"lse", "return_lse"}
        return attend(query=query, **others)

    return older


class _Package(ModuleType):
    """A package that has every name."""

    __path__: list[str] = []  # noqa: RUF012 - as Python has it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Blackwell:
    """The platform, with compute capability 10."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_device_capability(self, capability: Any, *_: Any) -> bool:
        return capability == 100

    def is_device_capability_family(self, capability: int, *_: Any) -> bool:
        return capability == 100

    def has_device_capability(self, capability: Any, *_: Any) -> bool:
        return True

    def get_device_capability(self, *_: Any) -> Any:
        from vllm.platforms.interface import DeviceCapability

        return DeviceCapability(10, 0)


@contextmanager
def backend_module() -> Iterator[tuple[ModuleType, pytest.MonkeyPatch]]:
    """Import vLLM's backend as on a GPU of compute capability 10 with FlashInfer."""
    # It looks for the package when it is imported, and must not find ours.
    import vllm.utils.flashinfer  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".decode", ".prefill", ".utils"):
            patch.setitem(sys.modules, f"flashinfer{name}", _Package(f"flashinfer{name}"))
        for name in (_BACKEND, "vllm_medusa.plugin.worker.v2.flashinfer_backend"):
            patch.delitem(sys.modules, name, raising=False)
        module = import_module(_BACKEND)
        patch.setattr(module, "current_platform", _Blackwell(module.current_platform))
        for name in ("can_use", "supports", "use"):
            patch.setattr(module, f"{name}_trtllm_attention", lambda *_, **__: True)
        yield module, patch
        for name in (_BACKEND, "vllm_medusa.plugin.worker.v2.flashinfer_backend"):
            sys.modules.pop(name, None)


@contextmanager
def flashinfer_attention(
    *, returns_sums: bool = True, workspace_bytes: int = 2**23
) -> Iterator[FlashInfer]:
    """Let the platform choose ``FLASHINFER``, and stand for what is compiled for GPUs alone."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from tests.v2.cuda_graphs import as_kernel
    from tests.v2.interpreter import write_cache

    def chosen(cls: Any, *args: Any, **kwargs: Any) -> str:
        return AttentionBackendEnum.FLASHINFER.get_path()

    write = as_kernel(write_cache)

    def update(
        self: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        caches = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        write(key, value, *caches, slots, "auto", layer._k_scale, layer._v_scale)

    stand_in = FlashInfer()
    with backend_module() as (module, patch):
        patch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(chosen))
        attend = as_kernel(stand_in.attend)
        if returns_sums:
            attend = functools.wraps(stand_in.attend)(attend)
        else:
            attend = without_sums(attend)
        patch.setattr(module, "trtllm_batch_context_with_kv_cache", attend)
        patch.setattr(module, "trtllm_batch_decode_with_kv_cache", as_kernel(stand_in.decode))
        patch.setattr(module.FlashInferImpl, "do_kv_cache_update", update)
        workspace = torch.zeros(workspace_bytes, dtype=torch.uint8)
        patch.setattr(module, "_get_trtllm_workspace_buffer", lambda: workspace)
        # vLLM 0.33 only.
        for name in ("get_trtllm_gen_multi_ctas_kv_counter_bytes", "get_device_sm_count"):
            patch.setattr(module, name, lambda *_: 1, raising=False)
        patch.setattr(
            module, "_get_multi_ctas_kv_counter_buffer", lambda *_: workspace, raising=False
        )
        yield stand_in
