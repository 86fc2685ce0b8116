"""Names of the tensors of Hydra heads, as the authors' repository writes them.

The file is the state of their `HydraMLP` (zankner/Hydra, `hydra/model/hydra_heads/mlp_head.py` and
`hydra/train/train.py`), with h: head, l: layer from 1:

- `hydra_mlp.{h}.0.linear.weight|bias` and `hydra_mlp.{h}.0.res_connection.weight|bias`
- `hydra_mlp.{h}.{l}.linear.weight|bias`, where one layer is repeated under several names
- `hydra_lm_head.{h}.weight|bias`
- `input_embed_fn.weight`, a copy of the target's embedding, which is not read
"""

import re
from collections.abc import Iterable
from pathlib import Path

from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.slots import Slot, check_complete

BLOCK = re.compile(
    r"hydra_mlp\.(?P<head>\d+)\.(?P<layer>\d+)\.(?P<part>linear|res_connection)\."
    r"(?P<kind>weight|bias)"
)
#: Of our own format: the first layer of each head, W and R in one.
NATIVE = re.compile(r"hydra\.(?P<head>\d+)\.(?:weight|bias)")
_EMBEDDING = "input_embed_fn.weight"
_PREFIX_LAYER = "prefix_embeding_layer."  # their spelling
_PARTS = ("linear", "res_connection")


def slots(location: Path, stored: Iterable[str], names: dict[str, str]) -> dict[str, Slot]:
    """Return the canonical place of each tensor, by its stored name.

    Args:
        location: the checkpoint, for messages.
        stored: the names of all tensors of the checkpoint.
        names: stored names of the heads' tensors by those without prefix.

    Raises:
        UserError: another form of Hydra heads, or tensors missing or left over.
    """
    if any(name.startswith(_PREFIX_LAYER) for name in stored):
        raise UserError(
            f"{location}: holds Hydra heads with a layer of attention before them (Hydra++, "
            "hydra_head_arch 'prefix-mlp'), which is not supported; use heads of hydra_head_arch "
            "'mlp', or train some with `vllm-medusa train --hydra`"
        )
    blocks = [match for match in map(BLOCK.fullmatch, names) if match]
    if not any(match["part"] == "res_connection" for match in blocks):
        raise UserError(
            f"{location}: holds Hydra heads that do not read tokens (grounded_heads is false); "
            "train some with `vllm-medusa train --hydra`"
        )
    num_heads = 1 + max(int(match["head"]) for match in blocks)
    num_layers = 1 + max(int(match["layer"]) for match in blocks)
    if max(num_heads, num_layers) > len(names):
        raise UserError(
            f"{location}: the tensors are numbered up to head {num_heads - 1} and layer "
            f"{num_layers - 1} but are only {len(names)}; export the heads again"
        )
    expected = _expected(num_heads, num_layers)
    needed = {name: key for name, key in names.items() if name != _EMBEDDING}
    what = f"{num_heads} Hydra heads of {num_layers} layers"
    check_complete(location, expected, needed, what)
    return {names[name]: slot for name, slot in expected.items()}


def native_names(num_heads: int) -> list[str]:
    """Return the names in our own format, which are canonical."""
    return [f"hydra.{head}.{kind}" for head in range(num_heads) for kind in ("weight", "bias")]


def _expected(num_heads: int, num_layers: int) -> dict[str, Slot]:
    names: dict[str, Slot] = {}
    for head in range(num_heads):
        for kind in ("weight", "bias"):
            for index, part in enumerate(_PARTS):
                name = f"hydra_mlp.{head}.0.{part}.{kind}"
                names[name] = (f"hydra.{head}.{kind}", (index,))
            for layer in range(1, num_layers):
                name = f"hydra_mlp.{head}.{layer}.linear.{kind}"
                names[name] = (f"blocks.{kind}", (head, layer - 1))
            names[f"hydra_lm_head.{head}.{kind}"] = (f"lm_head.{kind}", (head,))
    return names
