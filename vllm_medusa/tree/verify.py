"""Lossless acceptance: walk the tree along the tokens taken from the target's distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_medusa.tree.layout import TreeLayout

#: Fills the places of an output row behind its last token, as in vLLM's ``RejectionSampler``.
PLACEHOLDER_TOKEN_ID = -1


@dataclass(frozen=True)
class Acceptance:
    """What one step accepted, for B requests and a tree of depth D.

    Attributes:
        node: [B] int64, the last accepted node; 0 if no draft was accepted.
        length: [B] int64, number of accepted draft tokens: the depth of ``node``.
        path: [B, D + 1] int64, the nodes from the root to ``node``; ``node`` repeats behind.
        tokens: [B, D + 1] int64, the accepted tokens and the bonus or recovered one behind them,
            then ``PLACEHOLDER_TOKEN_ID``.

    """

    node: Tensor
    length: Tensor
    path: Tensor
    tokens: Tensor


def accept_lossless(
    layout: TreeLayout, target_tokens: Tensor, draft_tokens: Tensor, num_draft_tokens: Tensor
) -> Acceptance:
    """Accept the drafts that agree with the target's own tokens.

    From the root on, the child whose token is the one taken from the target's distribution at the
    current node is accepted; where no child has it, that token ends the step. Every emitted token
    is a sample of the target, so the output law is the target's, for any tree. Of siblings with
    the same token the first counts.

    Args:
        layout: the full tree.
        target_tokens: [B, N + 1] token taken from the target at each node.
        draft_tokens: [B, N] token of each draft node.
        num_draft_tokens: [B] how many of the nodes were verified, from the first on; what the
            other columns hold does not matter.

    Returns:
        The acceptance. It is computed by a fixed number of tensor operations, on the tensors'
        device, without synchronising with the host.

    """
    matches = _matching_nodes(layout, target_tokens, draft_tokens, num_draft_tokens)
    on_path = matches[:, layout.depth_first_ancestors].all(dim=-1)
    node = _first_chain(layout, on_path)
    length = layout.depths[node]
    path = layout.ancestors[node]
    emitted = torch.arange(layout.depth + 1, device=node.device) <= length[:, None]
    tokens = target_tokens.gather(1, path).where(emitted, PLACEHOLDER_TOKEN_ID)
    return Acceptance(node=node, length=length, path=path, tokens=tokens)


def _matching_nodes(
    layout: TreeLayout, target_tokens: Tensor, draft_tokens: Tensor, num_draft_tokens: Tensor
) -> Tensor:
    """[B, N + 1] whether a node was verified and has the token taken at its parent."""
    nodes = torch.arange(layout.num_nodes, device=target_tokens.device)
    matches = torch.ones_like(target_tokens, dtype=torch.bool)
    matches[:, 1:] = draft_tokens == target_tokens[:, layout.parents[1:]]
    return matches & (nodes <= num_draft_tokens[:, None])


def _first_chain(layout: TreeLayout, on_path: Tensor) -> Tensor:
    """[B] deepest node of the chain that takes the first matching child at every depth.

    ``on_path`` is [B, N + 1] in depth-first order. There the first candidate of a depth is the
    first matching child of the chosen node if it is below that node at all, because siblings'
    subtrees do not interleave. If it is not, the chain ends above it.
    """
    levels = torch.arange(1, layout.depth + 1, device=on_path.device)
    candidates = on_path[:, None, :] & (layout.depth_first_depths == levels[:, None])
    found, place = candidates.max(dim=-1)
    first = layout.depth_first[place]
    above = torch.nn.functional.pad(first[:, :-1], (1, 0))
    connected = found & (layout.parents[first] == above)
    length = connected.cumprod(dim=-1).sum(dim=-1)
    chain = torch.nn.functional.pad(first, (1, 0))
    return chain.gather(1, length[:, None]).squeeze(1)
