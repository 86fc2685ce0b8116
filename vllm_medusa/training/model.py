"""The heads that are trained: residual blocks, and the lm_heads that they project with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_medusa.acceptance.stored_heads import StoredHeads
from vllm_medusa.errors import UserError
from vllm_medusa.heads import load_heads
from vllm_medusa.heads.checkpoint import HeadsCheckpoint, HeadsKind, HeadsSpec
from vllm_medusa.heads.gated import GatedLayers
from vllm_medusa.heads.hydra import HydraHeads
from vllm_medusa.heads.io.write import WriteFormat, needs_lm_head
from vllm_medusa.heads.module import MedusaHeads
from vllm_medusa.heads.prefix import PrefixAttention
from vllm_medusa.heads.recurrent import RecurrentHeads
from vllm_medusa.heads.selector import Selector
from vllm_medusa.heads.sequential import features_along
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.new_layers import (
    low_rank_factors,
    new_gated_layers,
    new_prefix_attention,
    new_selector,
)
from vllm_medusa.training.settings import TrainSettings

#: Of a new prefix attention.
_KINDS = {"shared": "target", "own": "own", "low-rank": "low_rank"}


class TrainableHeads(nn.Module):
    """Medusa or Hydra heads in float32, which start as the target's own next-token guess.

    The layers start as the identity. Lm_heads of their own start as copies of the target's,
    low-rank ones as its best approximation of their rank (a truncated singular value
    decomposition).

    Args:
        settings: the heads' number and kind.
        target: its lm_head is used or copied, and root-aware and Hydra heads use its embedding;
            neither is trained.

    Raises:
        UserError: a rank is above the hidden size.
    """

    logit_scale = 1.0

    def __init__(self, settings: TrainSettings, target: FrozenTarget) -> None:
        super().__init__()
        lm_head = target.weight
        self.use(target)
        self.lm_head_kind = settings.lm_head
        self.num_heads, self.num_layers = settings.num_heads, settings.num_layers
        shape = (settings.num_heads, settings.num_layers, lm_head.shape[1])
        embedding_size = target.embedding.shape[1]
        self.blocks: MedusaHeads | HydraHeads | GatedLayers
        if settings.hydra:
            self.blocks = HydraHeads(
                *(*shape, embedding_size, self._embed),
                dtype=torch.float32,
                device=lm_head.device,
            )
        elif settings.recurrent:
            self.blocks = new_gated_layers(settings, target)
        else:
            self.blocks = MedusaHeads(
                *shape,
                bias=True,
                root_size=embedding_size if settings.root_aware else None,
                dtype=torch.float32,
                device=lm_head.device,
            )
        self.prefix: PrefixAttention | None = None
        if settings.prefix_attention or settings.recurrent:
            self.prefix = new_prefix_attention(settings, target)
        self.selector: Selector | None = None
        if settings.selector:
            self.selector = new_selector(settings, target, settings.num_heads)
        if settings.lm_head == "own":
            self.weight = _copies(lm_head.float(), settings.num_heads)
        elif settings.lm_head == "low-rank":
            assert settings.rank is not None
            if settings.rank > lm_head.shape[1]:
                raise UserError(
                    f"--rank {settings.rank}: the target's hidden size is {lm_head.shape[1]}, and "
                    "no lm_head has a larger rank; give a smaller one, or --lm-head own"
                )
            down, up = low_rank_factors(lm_head, settings.rank)
            self.down = _copies(down, settings.num_heads)
            self.up = _copies(up, settings.num_heads)

    def use(self, target: FrozenTarget) -> None:
        """Read the lm_head and the embedding of this target from now on."""
        # Plain tensors: no parameters of this module.
        self._embedding = target.embedding.detach()
        self._shared = target.weight.detach()

    @torch.no_grad()
    def start_from(self, checkpoint: HeadsCheckpoint) -> None:
        """Take over the weights of heads of this kind (`settings_of`)."""
        tensors = checkpoint.tensors
        self.blocks = MedusaHeads.from_tensors(
            {"blocks.bias": torch.zeros_like(tensors["blocks.weight"][..., 0]), **tensors},
            torch.float32,
            self._shared.device,
        )
        if self.prefix is not None:
            self.prefix = PrefixAttention.from_tensors(tensors, torch.float32, self._shared.device)
        if self.selector is not None:
            self.selector = Selector.from_tensors(tensors, torch.float32, self._shared.device)
        for name in ("weight", "down", "up"):
            stored = tensors.get(f"lm_head.{name}", ())
            for parameter, tensor in zip(getattr(self, name, ()), stored, strict=True):
                parameter.copy_(tensor)

    def in_context(self, hidden: Tensor, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Run the prefix attention, with products in the dtype of `hidden` (`ranks.Heads`).

        Recurrent heads run it at every depth: their features are what this returns.
        """
        if self.prefix is None:
            return hidden
        with _products_in(hidden):
            if isinstance(self.blocks, GatedLayers):
                heads = RecurrentHeads(self.prefix, self.blocks, self._embed)
                return heads.along(self.num_heads, hidden, tokens, position_ids)
            attended = self.prefix.along(hidden, self._embed(tokens.roll(-1, 1)), position_ids)
        return attended.to(hidden.dtype)

    def features(self, hidden: Tensor, following: Tensor) -> Tensor:
        """Compute what the lm_heads read, with products in the dtype of `hidden`.

        Args:
            hidden: [N, H] states, in context (`in_context`).
            following: [N, K] int64, the tokens after each, the root first.

        Returns:
            [K, N, H]
        """
        if isinstance(self.blocks, GatedLayers):
            return RecurrentHeads.by_head(self.num_heads, hidden)
        with _products_in(hidden):
            if isinstance(self.blocks, HydraHeads):
                return features_along(self.blocks, self.num_heads, hidden, following)
            seen = None if self.blocks.root is None else self._embed(following[:, 0])
            features: Tensor = self.blocks(hidden, seen)
        return features

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self._embedding)

    def factors(self, head: int) -> list[Tensor]:
        """Return the matrices that project one head's features, each (out, in), first to last."""
        if self.lm_head_kind == "shared":
            return [self._shared]
        if self.lm_head_kind == "own":
            return [self.weight[head]]
        return [self.down[head], self.up[head]]

    def logits(self, features: Tensor, head: int) -> Tensor:
        """Project one head's features onto the vocabulary: [N, H] to [N, V]."""
        for factor in self.factors(head):
            features = nn.functional.linear(features, factor.to(features.dtype))
        return features

    def checkpoint(self, dtype: torch.dtype, base_model: str) -> HeadsCheckpoint:
        """Return the heads as they are written, in `dtype`."""
        tensors = dict(self.blocks.canonical_tensors())
        if self.prefix is not None:
            tensors |= self.prefix.canonical_tensors()
        if self.selector is not None:
            tensors |= self.selector.canonical_tensors()
        if self.lm_head_kind == "own":
            tensors["lm_head.weight"] = torch.stack(list(self.weight)).detach()
        elif self.lm_head_kind == "low-rank":
            tensors["lm_head.down"] = torch.stack(list(self.down)).detach()
            tensors["lm_head.up"] = torch.stack(list(self.up)).detach()
        vocab_size, hidden_size = self._shared.shape
        kind: HeadsKind = "medusa"
        if isinstance(self.blocks, HydraHeads):
            kind = "hydra"
        elif isinstance(self.blocks, GatedLayers):
            kind = "recurrent"
        sees_embeddings = kind == "hydra" or "root.weight" in tensors or self.prefix is not None
        spec = HeadsSpec(
            source_format="native",
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            draft_vocab_size=None,
            lm_head=_KINDS[self.lm_head_kind],  # type: ignore[arg-type]
            has_bias=True,
            logit_scale=self.logit_scale,
            dtype=dtype,
            root_size=self._embedding.shape[1] if sees_embeddings else None,
            selector_rank=None if self.selector is None else self.selector.rank,
            prefix_window=None if self.prefix is None else self.prefix.window,
            kind=kind,
        )
        stored = {name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}
        return HeadsCheckpoint(spec, stored, base_model=base_model)


class HeadsAsTheyAre(nn.Module):
    """Heads of a checkpoint, which do not change, with a selector that is trained in float32.

    Args:
        checkpoint: the heads; their own selector, if any, is left out.
        settings: settings of the training.
        target: the target of the heads.

    Raises:
        UserError: the selector's rank is above the size of the target's embeddings.
    """

    blocks = prefix = None

    def __init__(
        self, checkpoint: HeadsCheckpoint, settings: TrainSettings, target: FrozenTarget
    ) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        stored = StoredHeads(checkpoint, target)
        self.num_heads, self.logit_scale = stored.num_heads, stored.logit_scale
        self.in_context, self.features = stored.in_context, stored.features
        self.logits = stored.logits
        self.selector = new_selector(settings, target, stored.num_heads)

    def checkpoint(self, dtype: torch.dtype, base_model: str) -> HeadsCheckpoint:
        """Return the heads with the selector, all in the heads' own dtype, without their trees.

        The trees belong to the ranks without the selector.
        """
        spec = self._checkpoint.spec
        tensors = self.selector.canonical_tensors()
        stored = {name: tensor.to("cpu", spec.dtype) for name, tensor in tensors.items()}
        return HeadsCheckpoint(
            replace(
                spec,
                source_format="native",
                vocab_size=len(self.selector.parent),
                selector_rank=self.selector.rank,
            ),
            self._checkpoint.tensors | stored,
            base_model=base_model,
        )


TrainedHeads = TrainableHeads | HeadsAsTheyAre


def make_heads(settings: TrainSettings, target: FrozenTarget) -> tuple[TrainedHeads, str | None]:
    """Make the heads to train, and a hash of those that were given.

    Raises:
        UserError: heads that were given cannot be read or trained on.
    """
    if settings.heads is None:
        return TrainableHeads(settings, target), None
    checkpoint = load_heads(
        settings.heads,
        target_hidden_size=target.hidden_size,
        target_vocab_size=target.vocab_size,
    )
    if checkpoint.spec.is_sequential:
        raise UserError(
            f"--heads {settings.heads}: are {checkpoint.spec.kind} heads, which are not trained on "
            "and get no selector, because they see the path already; give Medusa heads"
        )
    if settings.selector_only:
        return HeadsAsTheyAre(checkpoint, settings, target), checkpoint.fingerprint()
    heads = TrainableHeads(settings_of(settings, checkpoint), target)
    heads.start_from(checkpoint)
    return heads, checkpoint.fingerprint()


def settings_of(settings: TrainSettings, checkpoint: HeadsCheckpoint) -> TrainSettings:
    """Return the settings with the kind of heads that a checkpoint holds, to train on from it.

    Raises:
        UserError: heads of this kind are not trained here.
    """
    spec = checkpoint.spec
    kind = next((ours for ours, theirs in _KINDS.items() if theirs == spec.lm_head), None)
    for is_there, what in (
        (kind is None, "one lm_head common to all heads"),
        (spec.draft_vocab_size is not None, "a draft vocabulary"),
        (spec.logit_scale != 1.0, "scaled logits"),
    ):
        if is_there:
            raise UserError(
                f"--heads {settings.heads}: heads with {what} cannot be trained on; leave --heads "
                "out to train new ones"
            )
    down = checkpoint.tensors.get("lm_head.down")
    values = {
        "heads": None,
        "heads_warmup": settings.warmup_share,
        "num_heads": spec.num_heads,
        "num_layers": spec.num_layers,
        "lm_head": kind,
        "rank": None if down is None else down.shape[1],
        "root_aware": "root.weight" in checkpoint.tensors,
        "prefix_attention": spec.prefix_window is not None,
        "prefix_window": spec.prefix_window or settings.prefix_window,
        "selector": spec.selector_rank is not None,
        "selector_rank": spec.selector_rank or settings.selector_rank,
    }
    return replace(settings, **values)  # type: ignore[arg-type]


def write_format_of(checkpoint: HeadsCheckpoint) -> WriteFormat:
    """Return the published format where it can hold the heads, our own where it cannot."""
    spec = checkpoint.spec
    if spec.sees_tokens or spec.lm_head == "low_rank" or needs_lm_head(checkpoint, "tgi"):
        return "native"
    return "tgi"


def _products_in(hidden: Tensor) -> torch.autocast:
    """Compute products of float32 weights in the dtype of `hidden`."""
    is_lower = hidden.dtype != torch.float32
    return torch.autocast(
        hidden.device.type, dtype=hidden.dtype if is_lower else None, enabled=is_lower
    )


def _copies(tensor: Tensor, count: int) -> nn.ParameterList:
    """One parameter per head: the gradient of a slice would be as large as all of them."""
    return nn.ParameterList(nn.Parameter(tensor.clone()) for _ in range(count))
