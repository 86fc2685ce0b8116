"""Products by matrices that do not change, as linear layers of the platform.

On a CPU vLLM prepacks the weights of its layers (``dispatch_cpu_unquantized_gemm``,
``model_executor/layers/utils.py``). ``F.linear`` packs them anew at every call, which for few rows
takes longer than the product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import ReplicatedLinear


def platform_linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> ReplicatedLinear:
    """Return a layer of the platform with these weights [out, in] and biases [out]."""
    out_features, in_features = weight.shape
    with device:
        # Not split by vLLM: the weights are this rank's rows already.
        layer = ReplicatedLinear(
            in_features,
            out_features,
            bias=bias is not None,
            params_dtype=dtype,
            return_bias=False,
            disable_tp=True,
        )
    layer.weight_loader(layer.weight, weight)
    if bias is not None:
        layer.weight_loader(layer.bias, bias)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


class PlatformProduct:
    """Multiplies rows [..., in] by matrices [out, in] that stay where they are.

    Each gets a layer, with a copy of it, when it is first used.
    """

    def __init__(self) -> None:
        self._layers: dict[tuple[int, torch.Size], ReplicatedLinear] = {}

    def __call__(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """Return [..., out]."""
        key = matrix.data_ptr(), matrix.shape
        layer = self._layers.get(key)
        if layer is None:
            layer = platform_linear(matrix.detach(), None, matrix.dtype, matrix.device)
            self._layers[key] = layer
        product: Tensor = layer(rows)
        return product
