"""Recurrent heads: one layer with prefix attention, run again for each token of a draft.

Medusa heads guess the tokens at all depths from one state. Here head k reads what head k - 1 has
made of the text, which stands for the target's hidden state one token further, and the token that
was drafted there; its attention reads the text and the draft so far. EAGLE's drafter works like
this (arXiv 2401.15077, section 4.1), with the whole text. The layers are a prefix attention and
gated layers, together like a decoder layer of the target, and all depths have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_medusa.heads.gated import GatedLayers
from vllm_medusa.heads.prefix import Drafted, PrefixAttention, PrefixWindow


@dataclass(frozen=True)
class RecurrentHeads:
    """The layers of recurrent heads before their lm_heads.

    Attributes:
        prefix: the attention.
        layers: what comes after it.
        embed: from tokens [...] to the target's embeddings [..., E].
    """

    prefix: PrefixAttention
    layers: GatedLayers
    embed: Callable[[Tensor], Tensor]

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        embed: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> RecurrentHeads:
        """Build heads of canonical tensors (`HeadsCheckpoint`), which are not trained."""
        prefix = PrefixAttention.from_tensors(tensors, dtype, device)
        layers = GatedLayers.from_tensors(tensors, dtype, device)
        return cls(prefix.requires_grad_(False), layers.requires_grad_(False), embed)

    def along(self, num_heads: int, hidden: Tensor, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Run the heads along whole texts, as if they had drafted what follows each position.

        Args:
            num_heads: K.
            hidden: [B, S, H], the target's final hidden states.
            tokens: [B, S] int64; after the end of a text the features mean nothing.
            position_ids: [B, S] or [1, S] int64, from 0 in every text.

        Returns:
            [B, S, K H], the features that the lm_heads read, head by head
        """
        states, made, pairs = hidden, [], []
        following = self._embedded(tokens.roll(-1, 1), hidden)
        texts = self.prefix.texts(hidden, following, position_ids)
        for head in range(num_heads):
            drafted = None
            if head > 0:
                following = self._embedded(tokens.roll(-1 - head, 1), hidden)
                pairs.append(self.prefix.keys_and_values(states, following))
                drafted = Drafted(*(torch.stack(part, dim=2) for part in zip(*pairs, strict=True)))
            attended = self.prefix.read_texts(states, following, texts, drafted)
            states = self.layers(attended, following).to(hidden.dtype)
            made.append(states)
        return torch.cat(made, dim=-1)

    @staticmethod
    def by_head(num_heads: int, made: Tensor) -> Tensor:
        """[N, K H] rows of what `along` returns to features [K, N, H]."""
        return made.view(len(made), num_heads, -1).transpose(0, 1)

    def reading(self, num_heads: int, windows: PrefixWindow) -> RecurrentDraft:
        """Return K heads for drafts that go on from these texts."""
        ahead = torch.arange(num_heads, device=windows.keys.device).view(-1, 1, 1, 1)
        biases = self.prefix.bias_by_distance(windows, ahead).to(windows.keys.dtype)
        return RecurrentDraft(self, windows, biases)

    def _embedded(self, tokens: Tensor, like: Tensor) -> Tensor:
        return self.embed(tokens).to(like.dtype)


@dataclass(frozen=True)
class RecurrentDraft:
    """Recurrent heads with the texts that they read (see `sequential.SequentialHeads`).

    A path's state is its last features, and the keys and values of its tokens below the root.

    Attributes:
        heads: the layers.
        windows: of B texts; the paths [N] are as many for each, in their order.
        biases: [K, B, A, 1, M], of the prefix attention, for each head.
    """

    heads: RecurrentHeads
    windows: PrefixWindow
    biases: Tensor

    def first_state(self, hidden: Tensor) -> Tensor:
        """Return the states [N, H] of empty paths."""
        return hidden

    def advance(self, head: int, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Go on by one token of each path.

        Args:
            head: k.
            states: [N, H + 2 A d (k - 1)], of the first two heads [N, H].
            tokens: [N] int64.

        Returns:
            [N, H + 2 A d k] states and [N, H] features
        """
        prefix = self.heads.prefix
        last, before = states[:, : len(prefix.output)], states[:, len(prefix.output) :]
        following = self.heads.embed(tokens).to(states.dtype)
        queries, keys, values = prefix.queries_keys_and_values(last, following)
        drafted = None
        if head > 0:
            before = torch.cat((before, keys.flatten(1), values.flatten(1)), dim=1)
            pairs = before.view(len(before), head, 2, *prefix.head_shape)
            drafted = Drafted(*pairs.unbind(2))
        attended = prefix.read(last, queries, self.windows, self.biases[head], drafted)
        features: Tensor = self.heads.layers(attended, following)
        return torch.cat((features, before), dim=1), features
