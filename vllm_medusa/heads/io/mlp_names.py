"""Names of the tensors of MLP speculators, as IBM publishes them (model_type `mlp_speculator`).

With h: head, all of them with the prefix `speculator.`: `emb.{h}.weight`, `proj.{h}.weight`,
`ln.{h}.weight|bias`, `head.{h}.weight`. With `tie_weights` in config.json all heads share those of
the first one, but for `proj`, where they share those of the second one; what is stored for the
other heads, if anything, is the same again.
"""

import re
from pathlib import Path

from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.slots import Slot, check_complete

BLOCK = re.compile(r"proj\.(?P<head>\d+)\.(?P<kind>weight)")
CANONICAL = re.compile(r"speculator\.(?P<head>\d+)\.(?P<part>embedding|weight|scale|bias)")
_PARTS = {
    "emb.{}.weight": "embedding",
    "proj.{}.weight": "weight",
    "ln.{}.weight": "scale",
    "ln.{}.bias": "bias",
}
_NUMBERED = re.compile(r"(emb|proj|ln|head)\.\d+\.(weight|bias)")


def slots(location: Path, names: dict[str, str], *, is_tied: bool) -> dict[str, Slot]:
    """Return the canonical place of each tensor, by its stored name.

    Args:
        location: the checkpoint, for messages.
        names: stored names of the heads' tensors by those without prefix.
        is_tied: whether the heads share their tensors.

    Raises:
        UserError: tensors missing or left over.
    """
    if is_tied:
        expected = _expected([0]) | {"head.0.weight": ("lm_head.weight", ())}
        if "proj.1.weight" in names:
            expected["proj.1.weight"] = ("speculator.1.weight", ())
        names = {
            name: key
            for name, key in names.items()
            if name in expected or not _NUMBERED.fullmatch(name)
        }
        check_complete(location, expected, names, "an MLP speculator with tied weights")
    else:
        num_heads = 1 + max(int(m["head"]) for m in map(BLOCK.fullmatch, names) if m)
        if num_heads > len(names):
            raise UserError(
                f"{location}: the tensors are numbered up to head {num_heads - 1} but are only "
                f"{len(names)}; export the heads again"
            )
        expected = _expected(list(range(num_heads)))
        check_complete(location, expected, names, f"an MLP speculator of {num_heads} heads")
    return {names[name]: slot for name, slot in expected.items()}


def _expected(heads: list[int]) -> dict[str, Slot]:
    names: dict[str, Slot] = {}
    for head in heads:
        for name, part in _PARTS.items():
            names[name.format(head)] = (f"speculator.{head}.{part}", ())
        names[f"head.{head}.weight"] = ("lm_head.weight", (head,))
    return names
