"""The precision that tools choose when nobody says."""

from __future__ import annotations

import pytest
import torch

from vllm_medusa.target.precision import fast_dtype
from vllm_medusa.training.settings import TrainSettings


@pytest.mark.parametrize(
    ("gpu", "avx512_bf16", "amx", "expected"),
    [
        (None, False, False, "float32"),
        (None, True, False, "bfloat16"),
        (None, False, True, "bfloat16"),
        (False, True, True, "float32"),
        (True, False, False, "bfloat16"),
    ],
)
def test_bfloat16_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool | None,
    avx512_bf16: bool,
    amx: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast_dtype() == expected
    assert TrainSettings(model="m", data="d", steps=1).dtype == expected
