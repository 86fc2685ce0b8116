"""Reading the tensors of a plan and stacking them into their canonical form."""

import torch

from vllm_medusa.heads.errors import HeadsError
from vllm_medusa.heads.files import TensorStore
from vllm_medusa.heads.formats import Plan

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ANY = -1


def assemble(store: TensorStore, plan: Plan) -> dict[str, torch.Tensor]:
    """Read, check and stack the heads' tensors; floating-point ones in their common dtype.

    Returns:
        The tensors of `HeadsCheckpoint`, before a token map is applied to full lm_heads.

    Raises:
        HeadsError: a tensor is unreadable, of the wrong shape or dtype, or not finite.
    """
    lead: dict[str, tuple[int, ...]] = {}
    for name, index in plan.slots.values():
        known = lead.get(name, (0,) * len(index))
        lead[name] = tuple(max(size, i + 1) for size, i in zip(known, index, strict=True))
    tensors: dict[str, torch.Tensor] = {}
    for key, (name, index) in plan.slots.items():
        is_index = name in ("token_map", "d2t", "t2d")
        value = _read_index(store, key) if is_index else _read_finite(store, key)
        if not index:
            tensors[name] = value
            continue
        # The first part gives the shape of the others; `_check_shapes` checks the shape itself.
        whole = tensors.get(name, value.new_empty(lead[name] + value.shape))
        if value.shape != whole.shape[len(index) :]:
            raise _wrong_shape(store, key, value.shape, whole.shape[len(index) :])
        whole = whole.to(torch.promote_types(whole.dtype, value.dtype))
        whole[index] = value
        tensors[name] = whole
    _check_shapes(store, plan, tensors)
    if "d2t" in tensors:
        tensors["token_map"] = _token_map_of(store, tensors.pop("d2t"), tensors.pop("t2d"))
    return _in_one_dtype(tensors)


def _read_index(store: TensorStore, key: str) -> torch.Tensor:
    value = store.read(key)
    if value.dtype not in (torch.int32, torch.int64, torch.bool):
        raise HeadsError(
            f"{store.file_of(key)}: tensor {key!r} has dtype {value.dtype}; save it as int64"
        )
    return value.long()


def _token_map_of(store: TensorStore, d2t: torch.Tensor, t2d: torch.Tensor) -> torch.Tensor:
    """Speculators' form: d2t is target id minus draft id, t2d marks the drafted target ids."""
    token_map = d2t + torch.arange(len(d2t))
    if not torch.equal(token_map.sort().values, t2d.nonzero().flatten()):
        raise HeadsError(
            f"{store.location}: tensors 'd2t' and 't2d' name different tokens; export the heads "
            "again"
        )
    return token_map


def _read_finite(store: TensorStore, key: str) -> torch.Tensor:
    value = store.read(key)
    where = f"{store.file_of(key)}: tensor {key!r}"
    if value.dtype not in _FLOATS:
        raise HeadsError(
            f"{where} has dtype {value.dtype}: quantised heads are not supported; export the heads "
            "in float16, bfloat16 or float32"
        )
    if not torch.isfinite(value).all():
        raise HeadsError(f"{where} holds NaN or infinite values; export the heads again")
    return value


def _check_shapes(store: TensorStore, plan: Plan, tensors: dict[str, torch.Tensor]) -> None:
    """Check the canonical shapes against each other."""
    blocks = tensors["blocks.weight"].shape
    num_heads, num_layers, hidden_size = (*blocks, _ANY, _ANY, _ANY)[:3]
    rank = tensors["lm_head.down"].shape[1:2] if "lm_head.down" in tensors else ()
    shapes: dict[str, tuple[int, ...]] = {
        "blocks.weight": (num_heads, num_layers, hidden_size, hidden_size),
        "blocks.bias": (num_heads, num_layers, hidden_size),
        "lm_head.weight": (num_heads, _ANY, hidden_size)[plan.lm_head == "common" :],
        "lm_head.down": (num_heads, _ANY, hidden_size),
        "lm_head.up": (num_heads, _ANY, *rank),
        "token_map": (_ANY,),
        "d2t": (_ANY,),
        "t2d": (_ANY,),
    }
    first_part = {name: (key, index) for key, (name, index) in reversed(plan.slots.items())}
    for name, tensor in tensors.items():
        key, index = first_part[name]
        wanted = shapes[name]
        fits = len(wanted) == tensor.ndim and all(
            want in (_ANY, have) for want, have in zip(wanted, tensor.shape, strict=True)
        )
        if not fits or 0 in tensor.shape:
            raise _wrong_shape(store, key, tensor.shape[len(index) :], wanted[len(index) :])


def _wrong_shape(
    store: TensorStore, key: str, actual: tuple[int, ...], wanted: tuple[int, ...]
) -> HeadsError:
    sizes = ", ".join("any" if size == _ANY else str(size) for size in wanted)
    return HeadsError(
        f"{store.file_of(key)}: tensor {key!r} has shape {list(actual)}, expected [{sizes}]; "
        "export the heads again"
    )


def _in_one_dtype(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    dtype = tensors["blocks.weight"].dtype
    for tensor in tensors.values():
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
