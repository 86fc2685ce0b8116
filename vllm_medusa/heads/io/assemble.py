"""Reading the tensors of a plan and stacking them into their canonical form."""

import torch

from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.files import TensorStore
from vllm_medusa.heads.io.formats import Plan

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Dimensions of the canonical tensors; equal names have equal sizes.
_DIMENSIONS = {
    "blocks.weight": ("num_heads", "num_layers", "hidden_size", "hidden_size"),
    "blocks.bias": ("num_heads", "num_layers", "hidden_size"),
    "lm_head.weight": ("num_heads", "vocab_size", "hidden_size"),
    "lm_head.down": ("num_heads", "rank", "hidden_size"),
    "lm_head.up": ("num_heads", "vocab_size", "rank"),
    "token_map": ("draft_vocab_size",),
    "d2t": ("draft_vocab_size",),
    "t2d": ("target_vocab_size",),
}
_INDEX_TENSORS = ("token_map", "d2t", "t2d")


def assemble(store: TensorStore, plan: Plan) -> dict[str, torch.Tensor]:
    """Read, check and stack the heads' tensors; floating-point ones in their common dtype.

    Returns:
        The tensors of `HeadsCheckpoint`, before a token map is applied to full lm_heads.

    Raises:
        UserError: a tensor is unreadable, of the wrong shape or dtype, or not finite.
    """
    lead: dict[str, tuple[int, ...]] = {}
    for name, index in plan.slots.values():
        known = lead.get(name, (0,) * len(index))
        lead[name] = tuple(max(size, i + 1) for size, i in zip(known, index, strict=True))
    sizes: dict[str, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, (name, index) in plan.slots.items():
        value = _read_index(store, key) if name in _INDEX_TENSORS else _read_finite(store, key)
        dimensions = _DIMENSIONS[name][len(index) :]
        if name == "lm_head.weight" and plan.lm_head == "common":
            dimensions = ("vocab_size", "hidden_size")
        _check_shape(store, key, value, dimensions, sizes)
        if not index:
            tensors[name] = value
            continue
        whole = tensors.get(name, value.new_empty(lead[name] + value.shape))
        whole = whole.to(torch.promote_types(whole.dtype, value.dtype))
        whole[index] = value
        tensors[name] = whole
    if "d2t" in tensors:
        tensors["token_map"] = _token_map_of(store, tensors.pop("d2t"), tensors.pop("t2d"))
    return _in_one_dtype(tensors)


def _check_shape(
    store: TensorStore,
    key: str,
    value: torch.Tensor,
    dimensions: tuple[str, ...],
    sizes: dict[str, int],
) -> None:
    """Compare with the sizes found so far, and note new ones."""
    fits = value.ndim == len(dimensions) and 0 not in value.shape
    if fits:
        fits = all(
            sizes.setdefault(dimension, size) == size
            for dimension, size in zip(dimensions, value.shape, strict=True)
        )
    if not fits:
        expected = ", ".join(str(sizes.get(dimension, dimension)) for dimension in dimensions)
        raise UserError(
            f"{store.file_of(key)}: tensor {key!r} has shape {list(value.shape)}, expected "
            f"[{expected}]; export the heads again"
        )


def _read_index(store: TensorStore, key: str) -> torch.Tensor:
    value = store.read(key)
    if value.dtype not in (torch.int32, torch.int64, torch.bool):
        raise UserError(
            f"{store.file_of(key)}: tensor {key!r} has dtype {value.dtype}; save it as int64"
        )
    return value.long()


def _read_finite(store: TensorStore, key: str) -> torch.Tensor:
    value = store.read(key)
    where = f"{store.file_of(key)}: tensor {key!r}"
    if value.dtype not in _FLOATS:
        raise UserError(
            f"{where} has dtype {value.dtype}: quantised heads are not supported; export the heads "
            "in float16, bfloat16 or float32"
        )
    if not torch.isfinite(value).all():
        raise UserError(f"{where} holds NaN or infinite values; export the heads again")
    return value


def _token_map_of(store: TensorStore, d2t: torch.Tensor, t2d: torch.Tensor) -> torch.Tensor:
    """Speculators' form: d2t is target id minus draft id, t2d marks the drafted target ids."""
    token_map = d2t + torch.arange(len(d2t))
    if not torch.equal(token_map.sort().values, t2d.nonzero().flatten()):
        raise UserError(
            f"{store.location}: tensors 'd2t' and 't2d' name different tokens; export the heads "
            "again"
        )
    return token_map


def _in_one_dtype(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    dtype = tensors["blocks.weight"].dtype
    for tensor in tensors.values():
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
