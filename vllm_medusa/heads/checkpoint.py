"""Medusa heads of any published format in one canonical form."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_medusa.heads.io.formats import LmHeadKind, SourceFormat
from vllm_medusa.tree.schedule import TreeSchedule

TREE_FILE = "medusa_tree.json"
SCHEDULE_FILE = "medusa_tree_schedule.json"

HeadsKind = Literal["medusa", "hydra", "mlp_speculator", "recurrent"]


@dataclass(frozen=True, kw_only=True)
class HeadsSpec:
    """What kind of heads a checkpoint holds.

    Attributes:
        source_format: the format it was read from, see `formats`.
        num_heads, num_layers: heads, and layers in each before its lm_head.
        hidden_size: of the target's final hidden states, which the heads read.
        vocab_size: of the target; None if tensors, config.json and caller do not give it.
        draft_vocab_size: rows of the lm_heads if `token_map` restricts them to a part of the
            vocabulary, else None.
        lm_head: one matrix per head (`own`), one for all heads (`common`), the target's (`target`),
            or a down and an up factor per head (`low_rank`).
        has_bias: whether the blocks' linear layers have biases.
        logit_scale: factor on the heads' logits.
        dtype: of the floating-point tensors.
        root_size: E, of the target's token embeddings, if the heads read them (root-aware and Hydra
            heads, prefix attention), else None.
        selector_rank: r, of the selector's tables, if the heads have one, else None.
        prefix_window: W, of the prefix attention, if the heads have one, else None.
        kind: Medusa heads, which run all at once, or heads of `sequential`.
        scales_input: whether an MLP speculator normalises the hidden states first.
    """

    source_format: SourceFormat
    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int | None
    draft_vocab_size: int | None
    lm_head: LmHeadKind
    has_bias: bool
    logit_scale: float
    dtype: torch.dtype
    root_size: int | None = None
    selector_rank: int | None = None
    prefix_window: int | None = None
    kind: HeadsKind = "medusa"
    scales_input: bool = False

    @property
    def sees_tokens(self) -> bool:
        """Whether the heads see tokens or have a selector; not in our format 1."""
        seen = (self.root_size, self.selector_rank, self.prefix_window)
        return self.is_sequential or any(size is not None for size in seen)

    @property
    def is_sequential(self) -> bool:
        """Whether a head's guesses depend on the path above, so that the heads run in turn."""
        return self.kind != "medusa"


@dataclass(frozen=True)
class HeadsCheckpoint:
    """Medusa heads, stacked over heads so that one batched product serves all of them.

    Attributes:
        spec: what the heads are.
        tensors: by canonical name, with K heads, L layers, hidden size H, V rows of the lm_heads:
            `blocks.weight` [K, L, H, H] (out, in), `blocks.bias` [K, L, H] if `spec.has_bias`;
            `lm_head.weight` [K, V, H] (own) or [V, H] (common); `lm_head.down` [K, rank, H] and
            `lm_head.up` [K, V, rank] (low_rank); `token_map` [V] int64, from draft ids to target
            ids, if `spec.draft_vocab_size` is set; `root.weight` [K, H, E] (out, in) of root-aware
            heads; `selector.parent` and `selector.child` [vocab_size, r] and `selector.depth`
            [K, r] of heads with a selector; `prefix.{name}` for the parameters of
            `prefix.PrefixAttention` of heads with prefix attention. Of Hydra heads,
            `hydra.{k}.weight` [2, H, H + (k + 1) E] and `hydra.{k}.bias` [2, H], the first layer's
            W and R and their biases, and `blocks` [K, L - 1, ...] with the other layers, if there
            are any;
            `lm_head.bias` [K, V] if their lm_heads have biases. Of an MLP speculator with the inner
            size D, `speculator.{k}.embedding` [V, D], `speculator.{k}.weight` [D, H or D],
            `speculator.{k}.scale` and `speculator.{k}.bias` [D], of the later heads only where they
            do not share those before; its lm_heads read D features in place of H. Of recurrent
            heads, `prefix` and `gated.{name}` for the parameters of `gated.GatedLayers`.
        tree_paths: the tree that came with the heads, by descending probability, or None.
        tree_schedule: the trees by batch size that came with the heads, or None.
        base_model: the target that the heads' config.json names, or None.
        notes: oddities of the checkpoint that do not make it unusable.
    """

    spec: HeadsSpec
    tensors: dict[str, torch.Tensor]
    tree_paths: list[list[int]] | None = None
    tree_schedule: TreeSchedule | None = None
    base_model: str | None = None
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return a hash of the tensors."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]
