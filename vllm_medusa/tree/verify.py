"""Lossless acceptance: walk each tree along the tokens taken from the target's distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_medusa.tree.rows import NodeRows

#: Fills the places of an output row after its last token, as in vLLM's ``RejectionSampler``.
PLACEHOLDER_TOKEN_ID = -1


@dataclass(frozen=True)
class Acceptance:
    """What one step accepted, for B requests and trees of depth D at most.

    Attributes:
        node: [B] int64, the last accepted node; 0 if no draft was accepted.
        length: [B] int64, number of accepted draft tokens: the depth of ``node``.
        path: [B, D + 1] int64, the nodes from the root to ``node``; then ``node`` is repeated.
        tokens: [B, D + 1] int64, the accepted tokens and the bonus or recovered one after them,
            then ``PLACEHOLDER_TOKEN_ID``.

    """

    node: Tensor
    length: Tensor
    path: Tensor
    tokens: Tensor


def accept_lossless(rows: NodeRows, target_tokens: Tensor, draft_tokens: Tensor) -> Acceptance:
    """Accept the drafts that agree with the target's own tokens.

    The walk begins at the root. At each node it accepts the child that has the token taken from the
    target's distribution at this node. If no child has it, this token is emitted and ends the step.
    Every emitted token is a sample of the target, so the output has the target's distribution, for
    any tree. If siblings have the same token, the first one counts.

    Args:
        rows: the step's trees.
        target_tokens: [B, N + 1] token taken from the target at each node.
        draft_tokens: [B, N] token of each draft node; entries of nodes that a request does
            not run are ignored.

    Returns:
        The acceptance. It is computed by a fixed number of tensor operations, on the tensors'
        device, without synchronising with the host.

    """
    batch, num_nodes, width = rows.ancestors.shape
    if width == 1:
        none = torch.zeros_like(target_tokens)
        return Acceptance(none.squeeze(1), none.squeeze(1), path=none, tokens=target_tokens)
    matches = _matching_nodes(rows, target_tokens, draft_tokens)
    on_path = matches.gather(1, rows.ancestors.view(batch, -1)).view(batch, num_nodes, width)
    # At most one child of a node matches, so the accepted nodes lie on one path.
    node = torch.where(on_path.all(dim=-1), rows.depths, -1).argmax(dim=-1)
    path = rows.ancestors[torch.arange(batch, device=node.device), node]
    length = rows.depths.gather(1, node[:, None])
    emitted = torch.arange(width, device=node.device) <= length
    tokens = target_tokens.gather(1, path).where(emitted, PLACEHOLDER_TOKEN_ID)
    return Acceptance(node=node, length=length.squeeze(1), path=path, tokens=tokens)


def _matching_nodes(rows: NodeRows, target_tokens: Tensor, draft_tokens: Tensor) -> Tensor:
    """[B, N + 1] whether a node is run and the first child with the token taken at its parent."""
    matches = draft_tokens == target_tokens.gather(1, rows.parents[:, 1:])
    matches &= rows.is_run
    # Siblings that match have the same token; only the first of them may stay.
    is_later = (rows.earlier_siblings & matches[:, None]).any(dim=-1)
    return torch.nn.functional.pad(matches & ~is_later, (1, 0), value=True)
