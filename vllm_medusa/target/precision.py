"""The data type in which this machine multiplies fast."""

from __future__ import annotations

from typing import Literal


def fast_dtype() -> Literal["bfloat16", "float32"]:
    """Return ``bfloat16`` if the hardware has instructions for it, else ``float32``.

    Without them a processor takes many times longer for bfloat16 than for float32.
    """
    import torch

    if torch.cuda.is_available():
        has_products = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_products = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_products else "float32"
