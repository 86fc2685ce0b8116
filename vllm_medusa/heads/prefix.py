"""Prefix attention: a layer before the heads that looks back at the last tokens of the text.

A target's final hidden state is made for the next token; heads that read it alone know little of
what comes after. This layer adds to it what it finds at the last W positions of the text, in the
hidden states there and in the tokens that followed them: at position t it reads the hidden state of
t and the target's embedding of token t + 1. Hydra++ has such a layer (arXiv 2402.05109:
prefix attention), and EAGLE reads the same pairs (arXiv 2401.15077).

A window in place of the whole text bounds the memory of a request: `PrefixMemory` is a ring of W
keys and values. It holds positions that the target has verified, so nothing of it is ever undone.
Positions that the engine did not compute (those of a cached prefix) are missing in it. Distances
count through a learned bias for each one, so that keys do not depend on their position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6
#: Position of an entry that holds nothing: so far back that no window reaches it.
_NOTHING = -(2**62)


class PrefixAttention(nn.Module):
    """Attention of A attention heads of size d over a window of W positions.

    A new layer passes the hidden states through unchanged.

    Args:
        hidden_size: H, of the target's final hidden states.
        embedding_size: E, of the target's token embeddings.
        window: W, with the position itself.
        num_attention_heads: A.
        head_size: d.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        embedding_size: int,
        window: int,
        num_attention_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        width = num_attention_heads * head_size
        input_size = hidden_size + embedding_size
        self.query = zeros(width, input_size)
        self.key_value = zeros(2, width, input_size)
        self.output = zeros(hidden_size, width)
        self.bias = zeros(num_attention_heads, window)
        self.head_shape = (num_attention_heads, head_size)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> PrefixAttention:
        """Build a layer of canonical tensors (`HeadsCheckpoint`), converted to `dtype`."""
        num_heads, window = tensors["prefix.bias"].shape
        width, input_size = tensors["prefix.query"].shape
        hidden_size = len(tensors["prefix.output"])
        layer = cls(
            *(hidden_size, input_size - hidden_size, window, num_heads, width // num_heads),
            dtype=dtype,
            device=device,
        )
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(tensors[f"prefix.{name}"])
        return layer

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Draw the matrices that read the inputs; the one that writes the output stays zero."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.query, self.key_value):
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * parameter.shape[-1] ** -0.5)

    @property
    def window(self) -> int:
        """W."""
        return self.bias.shape[1]

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The parameters that are matrices or stacks of them [..., out, in]."""
        return [self.query, self.key_value, self.output]

    @property
    def biases(self) -> list[nn.Parameter]:
        """The other parameters."""
        return [self.bias]

    def canonical_tensors(self) -> dict[str, Tensor]:
        """Return the parameters under the names of `HeadsCheckpoint`."""
        return {f"prefix.{name}": tensor.detach() for name, tensor in self.named_parameters()}

    def along(self, hidden: Tensor, following: Tensor, position_ids: Tensor) -> Tensor:
        """Run the layer along whole texts.

        Each block of W positions attends to itself and to the block before it.

        Args:
            hidden: [B, S, H].
            following: [B, S, E], the target's embedding of the token after each.
            position_ids: [B, S] or [1, S] int64, from 0 in every text; rows may hold several texts.

        Returns:
            [B, S, H]
        """
        batch, length, _ = hidden.shape
        window, device = self.window, hidden.device
        missing = -length % window

        def blocks(rows: Tensor) -> Tensor:
            """[B, S, A d] to [B, S / W, W, A, d]."""
            rows = F.pad(rows, (0, 0, 0, missing))
            return rows.view(batch, -1, window, *self.head_shape)

        def with_last(rows: Tensor) -> Tensor:
            """[B, n, W, A, d] to [B, n, 2 W, A, d]: the block before comes first."""
            before = F.pad(rows, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
            return torch.cat((before, rows), dim=2)

        mixed = _mixed(hidden, following)
        queries = blocks(F.linear(mixed, self.query))
        keys, values = (with_last(blocks(rows)) for rows in self._key_value(mixed))
        places = torch.arange(2 * window, device=device)
        distance = places[window:, None] - places
        is_seen = (distance >= 0) & (distance < window)
        # A text begins at position 0, so nothing before it is nearer than this.
        positions = F.pad(position_ids, (0, missing)).expand(batch, -1)
        is_seen = is_seen & (distance <= positions.reshape(batch, -1, 1, window, 1))
        bias = self.bias[:, distance.clamp(0, window - 1)]
        attended = F.scaled_dot_product_attention(
            queries.transpose(2, 3),
            keys.transpose(2, 3),
            values.transpose(2, 3),
            attn_mask=bias.masked_fill(~is_seen, -torch.inf).to(queries.dtype),
        )
        rows = attended.transpose(2, 3).reshape(batch, length + missing, -1)[:, :length]
        return hidden + F.linear(rows, self.output)

    def keys_and_values(self, hidden: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a `PrefixMemory` keeps of T positions.

        Args:
            hidden: [T, H].
            following: [T, E], the target's embedding of the token after each.

        Returns:
            [T, A, d] and [T, A, d]
        """
        keys, values = self._key_value(_mixed(hidden, following))
        return keys.view(-1, *self.head_shape), values.view(-1, *self.head_shape)

    def at(
        self,
        hidden: Tensor,
        following: Tensor,
        memory: PrefixMemory,
        places: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """Run the layer at one position of each of B texts, which the memory holds already.

        Args:
            hidden: [B, H].
            following: [B, E], the target's embedding of the token after each.
            memory: of the texts' keys and values.
            places: [B] int64, each text's in the memory.
            positions: [B] int64.

        Returns:
            [B, H]
        """
        queries = F.linear(_mixed(hidden, following), self.query).view(-1, *self.head_shape)
        keys, values = memory.keys[places], memory.values[places]
        distance = positions[:, None] - memory.positions[places]
        is_seen = (distance >= 0) & (distance < self.window)
        bias = self.bias[:, distance.clamp(0, self.window - 1)].transpose(0, 1)
        attended = F.scaled_dot_product_attention(
            queries[:, :, None],
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=bias.masked_fill(~is_seen[:, None], -torch.inf)[:, :, None],
        )
        return hidden + F.linear(attended.flatten(1), self.output)

    def _key_value(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = F.linear(mixed, self.key_value.flatten(0, 1)).chunk(2, dim=-1)
        return keys, values


def _mixed(hidden: Tensor, following: Tensor) -> Tensor:
    """[..., H] and [..., E] to [..., H + E]."""
    return torch.cat((_normalised(hidden), _normalised(following.to(hidden.dtype))), dim=-1)


def _normalised(rows: Tensor) -> Tensor:
    return F.rms_norm(rows, rows.shape[-1:], eps=_EPS)


@dataclass(frozen=True)
class PrefixMemory:
    """Keys and values of the last W positions of up to R texts, a ring for each.

    Position p lies in entry p mod W. One place more, the last one, takes what is not to be kept.

    Attributes:
        keys: [R + 1, W, A, d].
        values: [R + 1, W, A, d].
        positions: [R + 1, W] int64, the position that each entry holds, or `_NOTHING`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @classmethod
    def make(cls, layer: PrefixAttention, num_texts: int) -> PrefixMemory:
        """Allocate for as many texts, on the layer's device and in its dtype."""
        like = layer.query
        shape = (num_texts + 1, layer.window)
        return cls(
            like.new_zeros(*shape, *layer.head_shape),
            like.new_zeros(*shape, *layer.head_shape),
            torch.full(shape, _NOTHING, dtype=torch.int64, device=like.device),
        )

    @property
    def nowhere(self) -> int:
        """The place for what is not to be kept."""
        return len(self.positions) - 1

    def forget(self, place: int) -> None:
        """Empty a place, for a text that begins or is computed again."""
        self.positions[place] = _NOTHING

    def keep(self, places: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep T positions.

        Args:
            places: [T] int64. Of each place, at most W positions in a row; the same position may
                come twice with the same keys and values.
            positions: [T] int64.
            keys: [T, A, d].
            values: [T, A, d].
        """
        entries = positions % self.positions.shape[1]
        self.keys[places, entries] = keys
        self.values[places, entries] = values
        self.positions[places, entries] = positions
