"""Names of the tensors in every published format of Medusa heads.

The format of a checkpoint is recognised by its tensors' names alone (h: head, l: layer, L: number
of layers):

=============== ===== =============================================================================
fasterdecoding  F1    `{h}.{l}.linear.weight|bias`, `{h}.{L}.weight`
tgi             F2    as F1 without `{h}.{L}.weight`: the target's own lm_head
merged          F3    as F1 or F2 with a prefix, beside the tensors of the backbone
vllm            F4    `blocks.{h}.layers.{l}.weight|bias`, `lm_heads.{h}.weight` or one
                      `lm_head.weight`, `token_map`; the speculators library: `d2t` and `t2d` in its
                      place
modelopt        F5    as F1 with the prefix `medusa_heads.` beside the backbone
native                stacked over heads: `blocks.weight|bias`, `lm_heads.weight` or
                      `lm_head.weight` or `lm_heads.down` and `lm_heads.up`, `token_map`; of
                      root-aware heads `root.weight`; of heads with a selector
                      `selector.parent`, `selector.child` and `selector.depth`; of Hydra heads
                      `hydra.{h}.weight|bias`, and `blocks` only beyond the first layer; of heads
                      with prefix attention `PREFIX_ATTENTION`; of recurrent heads these and
                      `GATED_LAYERS`, without `blocks`
hydra                 Hydra heads, see `hydra_names`
mlp_speculator        MLP speculators, see `mlp_names`
=============== ===== =============================================================================

Any of them may carry one of `PREFIXES`. The canonical tensors are those of `HeadsCheckpoint`.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_medusa.errors import UserError
from vllm_medusa.heads.io import hydra_names, mlp_names
from vllm_medusa.heads.io.slots import Slot, check_complete

SourceFormat = Literal[
    "fasterdecoding", "tgi", "merged", "vllm", "modelopt", "native", "hydra", "mlp_speculator"
]
LmHeadKind = Literal["own", "common", "target", "low_rank"]
NameStyle = Literal["sequential", "vllm", "native", "hydra", "mlp_speculator"]

PREFIXES = ("medusa_heads.", "medusa_head.", "medusa.", "speculator.")
SELECTOR = ("selector.parent", "selector.child", "selector.depth")
ROOT = ("root.weight",)
PREFIX_ATTENTION = tuple(f"prefix.{part}" for part in ("query", "key_value", "output", "bias"))
GATED_LAYERS = tuple(f"gated.{part}" for part in ("embedded", "gate_up", "down"))
LM_HEAD_BIAS = ("lm_heads.bias",)

_BLOCK: dict[NameStyle, re.Pattern[str]] = {
    "sequential": re.compile(r"(?P<head>\d+)\.(?P<layer>\d+)\.linear\.(?P<kind>weight|bias)"),
    "vllm": re.compile(r"blocks\.(?P<head>\d+)\.layers\.(?P<layer>\d+)\.(?P<kind>weight|bias)"),
    "native": re.compile(r"(?:blocks|hydra\.\d+)\.(?P<kind>weight|bias)|gated\.gate_up"),
    "hydra": hydra_names.BLOCK,
    "mlp_speculator": mlp_names.BLOCK,
}
_SEQUENTIAL_LM_HEAD = re.compile(r"(?P<head>\d+)\.(?P<layer>\d+)\.weight")
_VLLM_LM_HEAD = re.compile(r"lm_heads\.(?P<head>\d+)\.weight")
# Names that no backbone uses, so that heads may lie in the model's directory without a prefix.
_UNMISTAKABLE = re.compile(
    r"\d+\.\d+\.|blocks\.\d+\.layers\.|lm_heads\.\d+\.|hydra_(mlp|lm_head)\.|(token_map|d2t|t2d)$"
)
# An input embedding means that the checkpoint holds a whole model.
EMBEDDING = re.compile(r"(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte)\.weight$")
# What quantised linear layers store: scales and quantizer states of ModelOpt, GPTQ, AWQ and others.
_QUANTISED = re.compile(
    r"\.(weight_scale\w*|weight_packed|input_scale|pre_quant_scale|qweight|qzeros|scales|g_idx)$"
    r"|_quantizer\b|_amax$"
)


# Heads that hold one of these need no blocks.
_WITHOUT_BLOCKS = ("hydra.0.weight", "gated.gate_up")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where the canonical tensors of one checkpoint come from.

    Attributes:
        slots: the canonical place of each tensor of the checkpoint, by its stored name.
    """

    source_format: SourceFormat
    lm_head: LmHeadKind
    slots: dict[str, Slot]


def expected_names(
    style: NameStyle,
    *,
    num_heads: int,
    num_layers: int,
    lm_head: LmHeadKind,
    has_bias: bool,
    has_blocks: bool = True,
    others: Collection[str] = (),
) -> dict[str, Slot]:
    """Return every tensor name of complete heads in one style, with its canonical place.

    Args:
        style: how the names are built.
        num_heads: number of Medusa heads; ignored in the native style, like num_layers.
        num_layers: residual blocks per head.
        lm_head: which lm_heads the heads have.
        has_bias: whether the blocks have biases.
        has_blocks: whether there are any; only in the native style there may be none.
        others: tensors with their canonical names: those that restrict the draft vocabulary
            (`token_map`, or `d2t` and `t2d`), those of root-aware and Hydra heads, of a selector
            and of prefix attention, and biases of the lm_heads.
    """
    heads, layers = range(num_heads), range(num_layers)
    kinds = ("weight", "bias") if has_bias else ("weight",)
    names: dict[str, Slot] = {}
    if style == "native":
        names |= {f"blocks.{kind}": (f"blocks.{kind}", ()) for kind in kinds if has_blocks}
        names |= {
            "own": {"lm_heads.weight": ("lm_head.weight", ())},
            "common": {"lm_head.weight": ("lm_head.weight", ())},
            "low_rank": {f"lm_heads.{side}": (f"lm_head.{side}", ()) for side in ("down", "up")},
            "target": {},
        }[lm_head]
    else:
        block = "{}.{}.linear.{}" if style == "sequential" else "blocks.{}.layers.{}.{}"
        own = f"{{}}.{num_layers}.weight" if style == "sequential" else "lm_heads.{}.weight"
        for kind in kinds:
            names |= {
                block.format(h, layer, kind): (f"blocks.{kind}", (h, layer))
                for h in heads
                for layer in layers
            }
        if lm_head == "own":
            names |= {own.format(h): ("lm_head.weight", (h,)) for h in heads}
        elif lm_head == "common":
            names["lm_head.weight"] = ("lm_head.weight", ())
    return names | {name: (name.replace("lm_heads.", "lm_head."), ()) for name in others}


def select_heads(keys: Iterable[str]) -> Collection[str]:
    """Select the tensors of a checkpoint that belong to Medusa heads; none if it holds no heads."""
    stored = list(keys)
    is_heads = any(_style(_strip(key)) is not None for key in stored)
    return head_names(stored).values() if is_heads else ()


def is_heads_tensor(key: str) -> bool:
    """Whether a tensor of a checkpoint that holds a whole model belongs to Medusa heads."""
    return key.startswith(PREFIXES) or _UNMISTAKABLE.match(key) is not None


def head_names(keys: Iterable[str]) -> dict[str, str]:
    """Select the tensors that belong to the heads: from names without prefix to stored names.

    Beside a backbone these are the names that have a prefix or that no backbone uses; else all.

    Raises:
        UserError: two tensors whose names differ in the prefix only.
    """
    stored = list(keys)
    is_model = _holds_model(stored)
    names: dict[str, str] = {}
    for key in stored:
        if is_model and not is_heads_tensor(key):
            continue
        name = _strip(key)
        if name in names:
            raise UserError(
                f"tensors {names[name]!r} and {key!r} are the same part of the heads; remove one"
            )
        names[name] = key
    return names


def make_plan(
    location: Path, keys: Iterable[str], *, original_lm_head: bool, tie_weights: bool = False
) -> Plan:
    """Recognise the format and check that the heads are complete and nothing is left over.

    Args:
        location: the checkpoint, for messages.
        keys: the names of all its tensors.
        original_lm_head: the key of vLLM's config.json: one lm_head for all heads, which is the
            target's own if the checkpoint holds none.
        tie_weights: the key of an MLP speculator's config.json.

    Raises:
        UserError: no heads, quantised heads, or tensors missing or left over.
    """
    stored = list(keys)
    names = head_names(stored)
    for name, key in names.items():
        if _QUANTISED.search(name):
            raise UserError(
                f"{location}: tensor {key!r} belongs to quantised heads, which are not supported; "
                "export the heads in float16, bfloat16 or float32"
            )
    style = _recognised(location, names)
    if style == "hydra":
        slots = hydra_names.slots(location, stored, names)
        return Plan(source_format=style, lm_head="own", slots=slots)
    if style == "mlp_speculator":
        slots = mlp_names.slots(location, names, is_tied=tie_weights)
        kind: LmHeadKind = "common" if tie_weights else "own"
        return Plan(source_format=style, lm_head=kind, slots=slots)
    num_heads, num_layers = _count(style, names)
    if max(num_heads, num_layers) > len(names):
        raise UserError(
            f"{location}: the tensors are numbered up to head {num_heads - 1} and layer "
            f"{num_layers - 1} but are only {len(names)}; export the heads again"
        )
    lm_head = _lm_head_kind(style, names, original_lm_head)
    expected = expected_names(
        style,
        num_heads=num_heads,
        num_layers=num_layers,
        lm_head=lm_head,
        has_bias=any(match["kind"] == "bias" for match in _matches(_BLOCK[style], names)),
        has_blocks="blocks.weight" in names or names.keys().isdisjoint(_WITHOUT_BLOCKS),
        others=_other_names(style, names),
    )
    if style == "vllm" and original_lm_head and "lm_heads.0.weight" in names:
        # vLLM's loader reads it as the one lm_head of all heads.
        expected["lm_heads.0.weight"] = expected.pop("lm_head.weight")
    what = "stacked heads" if style == "native" else f"{num_heads} heads of {num_layers} layers"
    check_complete(location, expected, names, what)
    return Plan(
        source_format=_source_format(style, names, lm_head, _holds_model(stored)),
        lm_head=lm_head,
        slots={names[name]: slot for name, slot in expected.items()},
    )


def _recognised(location: Path, names: Collection[str]) -> NameStyle:
    """The one style that heads with these names have."""
    styles = {style for style in map(_style, names) if style is not None}
    if not styles:
        raise UserError(
            f'{location}: holds no Medusa heads; name heads with "model": HEADS in the '
            "speculative config, or train some with `vllm-medusa train`"
        )
    if len(styles) > 1:
        raise UserError(
            f"{location}: mixes heads of different formats ({', '.join(sorted(styles))}); "
            "keep one of them"
        )
    return styles.pop()


def _strip(key: str) -> str:
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def _style(name: str) -> NameStyle | None:
    return next((style for style, block in _BLOCK.items() if block.fullmatch(name)), None)


def _holds_model(keys: Iterable[str]) -> bool:
    return any(EMBEDDING.search(key) for key in keys)


def _matches(pattern: re.Pattern[str], names: Iterable[str]) -> Iterator[re.Match[str]]:
    return (match for match in map(pattern.fullmatch, names) if match)


def _count(style: NameStyle, names: Iterable[str]) -> tuple[int, int]:
    """Number of heads and layers that a complete checkpoint with these names must have."""
    if style == "native":
        return 1, 1  # one tensor holds them all
    blocks = list(_matches(_BLOCK[style], names))
    heads = {int(match["head"]) for match in blocks}
    num_layers = 1 + max(int(match["layer"]) for match in blocks)
    lm_head = _SEQUENTIAL_LM_HEAD if style == "sequential" else _VLLM_LM_HEAD
    for match in _matches(lm_head, names):
        heads.add(int(match["head"]))
        if style == "sequential":
            num_layers = max(num_layers, int(match["layer"]))
    return 1 + max(heads), num_layers


def _lm_head_kind(style: NameStyle, names: dict[str, str], original_lm_head: bool) -> LmHeadKind:
    if style == "sequential":
        return "own" if any(_matches(_SEQUENTIAL_LM_HEAD, names)) else "target"
    if style == "native":
        if "lm_heads.down" in names or "lm_heads.up" in names:
            return "low_rank"
        if "lm_heads.weight" in names:
            return "own"
        return "common" if "lm_head.weight" in names else "target"
    if "lm_head.weight" in names or (original_lm_head and "lm_heads.0.weight" in names):
        return "common"
    return "target" if original_lm_head else "own"


def _other_names(style: NameStyle, names: Collection[str]) -> list[str]:
    """The tensors beside blocks and lm_heads that complete heads with some of them have."""
    groups: list[tuple[str, ...]] = []
    if style != "sequential":
        groups.append(("token_map",) if "token_map" in names else ("d2t", "t2d"))
    if style == "native":
        heads = [int(match["head"]) for match in _matches(hydra_names.NATIVE, names)]
        groups += [ROOT, SELECTOR, PREFIX_ATTENTION, GATED_LAYERS]
        if "lm_heads.weight" in names:  # only these are applied with their biases
            groups.append(LM_HEAD_BIAS)
        # Not more than there are names, whatever number one of them has.
        groups.append(tuple(hydra_names.native_names(min(max(heads, default=-1) + 1, len(names)))))
    return [name for group in groups if any(part in names for part in group) for name in group]


def _source_format(
    style: NameStyle, names: dict[str, str], lm_head: LmHeadKind, is_model: bool
) -> SourceFormat:
    if style != "sequential":
        return style
    if is_model and any(key.startswith("medusa_heads.") for key in names.values()):
        return "modelopt"
    if is_model and any(key != name for name, key in names.items()):
        return "merged"
    return "tgi" if lm_head == "target" else "fasterdecoding"
