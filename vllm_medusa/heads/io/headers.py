"""Shapes and dtypes of a plan's tensors, from the headers of the weights files."""

from dataclasses import dataclass

import torch

from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.files import TensorStore
from vllm_medusa.heads.io.formats import Plan
from vllm_medusa.heads.io.hydra_names import NATIVE
from vllm_medusa.heads.io.mlp_names import CANONICAL

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Dimensions of the canonical tensors; equal names have equal sizes.
_DIMENSIONS = {
    "blocks.weight": ("num_heads", "num_layers", "hidden_size", "hidden_size"),
    "blocks.bias": ("num_heads", "num_layers", "hidden_size"),
    "lm_head.weight": ("num_heads", "vocab_size", "hidden_size"),
    "lm_head.bias": ("num_heads", "vocab_size"),
    "lm_head.down": ("num_heads", "rank", "hidden_size"),
    "lm_head.up": ("num_heads", "vocab_size", "rank"),
    "token_map": ("draft_vocab_size",),
    "d2t": ("draft_vocab_size",),
    "t2d": ("target_vocab_size",),
    "root.weight": ("num_heads", "hidden_size", "embedding_size"),
    "selector.parent": ("target_vocab_size", "selector_rank"),
    "selector.child": ("target_vocab_size", "selector_rank"),
    "selector.depth": ("num_heads", "selector_rank"),
    "prefix.query": ("attention_size", "prefix_input_size"),
    "prefix.key_value": ("two", "attention_size", "prefix_input_size"),
    "prefix.output": ("hidden_size", "attention_size"),
    "prefix.bias": ("num_attention_heads", "window"),
    "gated.embedded": ("hidden_size", "embedding_size"),
    "gated.gate_up": ("num_layers", "two", "inner_size", "hidden_size"),
    "gated.down": ("num_layers", "hidden_size", "inner_size"),
}
# Of Hydra heads, whose input grows from head to head.
_HYDRA_DIMENSIONS = {
    "weight": ("num_parts", "hidden_size", "input_size_{}"),
    "bias": ("num_parts", "hidden_size"),
}
# Of MLP speculators, whose first head reads the target's hidden state.
_SPECULATOR_DIMENSIONS: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab_size", "inner_size"),
    "weight": ("inner_size", "inner_size"),
    "scale": ("inner_size",),
    "bias": ("inner_size",),
}
_INDEX_TENSORS = ("token_map", "d2t", "t2d")


@dataclass(frozen=True)
class Header:
    """Shape of a canonical tensor, all heads stacked, and the dtype that holds all its parts."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_headers(store: TensorStore, plan: Plan) -> dict[str, Header]:
    """Read and check the shapes and dtypes of a plan's tensors.

    Returns:
        The headers by canonical name; for maps of the speculators library `d2t` and `t2d`.

    Raises:
        UserError: a file is unreadable, or a tensor has a wrong shape or dtype.
    """
    sizes = {"two": 2}
    headers: dict[str, Header] = {}
    for key, (name, index) in plan.slots.items():
        value = store.read(key)
        dimensions = _dimensions(name)[len(index) :]
        if name == "lm_head.weight":
            is_mlp = plan.source_format == "mlp_speculator"
            rows = ("vocab_size", "inner_size" if is_mlp else "hidden_size")
            dimensions = rows if plan.lm_head == "common" else (("num_heads", *rows)[len(index) :])
        _check_dtype(store, key, value.dtype, name)
        _check_shape(store, key, value.shape, dimensions, sizes)
        known = headers.get(name, Header((0,) * len(index), value.dtype))
        lead = tuple(max(size, i + 1) for size, i in zip(known.shape, index, strict=False))
        headers[name] = Header((*lead, *value.shape), torch.promote_types(known.dtype, value.dtype))
    return headers


def _dimensions(name: str) -> tuple[str, ...]:
    if of_speculator := CANONICAL.fullmatch(name):
        if (of_speculator["head"], of_speculator["part"]) == ("0", "weight"):
            return "inner_size", "hidden_size"
        return _SPECULATOR_DIMENSIONS[of_speculator["part"]]
    match = NATIVE.fullmatch(name)
    if match is None:
        return _DIMENSIONS[name]
    dimensions = _HYDRA_DIMENSIONS[name.rpartition(".")[2]]
    return tuple(dimension.format(match["head"]) for dimension in dimensions)


def _check_dtype(store: TensorStore, key: str, dtype: torch.dtype, name: str) -> None:
    where = f"{store.file_of(key)}: tensor {key!r} has dtype {dtype}"
    if name in _INDEX_TENSORS:
        if dtype not in (torch.int32, torch.int64, torch.bool):
            raise UserError(f"{where}; save it as int64")
    elif dtype not in _FLOATS:
        raise UserError(
            f"{where}: quantised heads are not supported; export the heads in float16, bfloat16 or "
            "float32"
        )


def _check_shape(
    store: TensorStore,
    key: str,
    shape: tuple[int, ...],
    dimensions: tuple[str, ...],
    sizes: dict[str, int],
) -> None:
    """Compare with the sizes found so far, and note new ones."""
    fits = len(shape) == len(dimensions) and 0 not in shape
    if fits:
        fits = all(
            sizes.setdefault(dimension, size) == size
            for dimension, size in zip(dimensions, shape, strict=True)
        )
    if not fits:
        expected = ", ".join(str(sizes.get(dimension, dimension)) for dimension in dimensions)
        raise UserError(
            f"{store.file_of(key)}: tensor {key!r} has shape {list(shape)}, expected "
            f"[{expected}]; export the heads again"
        )
