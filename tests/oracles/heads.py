"""Slow, obvious heads: one module per head, one row and one node at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vllm_medusa.heads import HeadsCheckpoint
from vllm_medusa.tree.draft_tree import TreePath

#: Guesses of a head that a selector ranks again.
NUM_CANDIDATES = 16


def features(heads: HeadsCheckpoint, hidden: Tensor, roots: Tensor | None = None) -> Tensor:
    """Head by head, layer by layer, nn.Linear and nn.SiLU: [K, B, H].

    `roots` [B, E] are the target's embeddings of the roots, which root-aware heads see.
    """
    rows = []
    for h in range(heads.spec.num_heads):
        x = hidden
        if roots is not None:
            x = hidden.clone()
            for row, root in enumerate(roots):
                x[row] += heads.tensors["root.weight"][h] @ root
        for layer in range(heads.spec.num_layers):
            linear = nn.Linear(*reversed(heads.tensors["blocks.weight"][h, layer].shape))
            linear.weight.data = heads.tensors["blocks.weight"][h, layer]
            linear.bias.data = torch.zeros(heads.spec.hidden_size, dtype=hidden.dtype)
            if heads.spec.has_bias:
                linear.bias.data = heads.tensors["blocks.bias"][h, layer]
            x = x + nn.SiLU()(linear(x))
        rows.append(x)
    return torch.stack(rows).detach()


def hydra_features(heads: HeadsCheckpoint, head: int, hidden: Tensor, seen: Tensor) -> Tensor:
    """[H] of one Hydra head, from one hidden state [H] and its path's embeddings [head + 1, E]."""
    tensors = heads.tensors
    x = torch.cat([hidden, *seen[: head + 1]])
    (w, r), (w_bias, r_bias) = tensors[f"hydra.{head}.weight"], tensors[f"hydra.{head}.bias"]
    x = r @ x + r_bias + nn.SiLU()(w @ x + w_bias)
    for layer in range(heads.spec.num_layers - 1):
        weight, bias = tensors["blocks.weight"][head, layer], tensors["blocks.bias"][head, layer]
        x = x + nn.SiLU()(weight @ x + bias)
    return x


def mlp_features(heads: HeadsCheckpoint, hidden: Tensor, tokens: Sequence[int]) -> Tensor:
    """[D] of an MLP speculator after a path of tokens, from one hidden state [H].

    The heads of tied ones share the tensors of the first, and `weight` of the second.
    """
    tensors, spec = heads.tensors, heads.spec

    def norm(x: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean() + 1e-6)

    state = norm(hidden) / 2**0.5 if spec.scales_input else hidden
    for head, token in enumerate(tokens):
        is_tied = "speculator.1.scale" not in tensors
        first = 0 if is_tied else head
        weight = tensors[f"speculator.{min(head, 1) if is_tied else head}.weight"]
        table = tensors[f"speculator.{first}.embedding"]
        kept = 0.5 ** (0.5 / spec.num_heads)
        share = math.sqrt((1 - kept**2) * (table.shape[1] / 2))
        x = norm(weight @ state + share / kept * table[token])
        x = x * tensors[f"speculator.{first}.scale"] + tensors[f"speculator.{first}.bias"]
        state = nn.GELU()(x)
    return state


def logits(heads: HeadsCheckpoint, rows: Tensor, lm_head: Tensor | None = None) -> Tensor:
    """[K, B, V], one row and head at a time; `lm_head` [V, H] is the target's."""
    tensors = heads.tensors
    results = []
    for h, feature in enumerate(rows):
        if heads.spec.lm_head == "own":
            matrix = tensors["lm_head.weight"][h]
        elif heads.spec.lm_head == "common":
            matrix = tensors["lm_head.weight"]
        elif heads.spec.lm_head == "target":
            assert lm_head is not None
            matrix = lm_head
        else:
            matrix = tensors["lm_head.up"][h] @ tensors["lm_head.down"][h]
        bias = tensors["lm_head.bias"][h] if "lm_head.bias" in tensors else 0
        results.append(torch.stack([matrix @ x + bias for x in feature]))
    return torch.stack(results)


def term(tensors: Mapping[str, Tensor], head: int, parent: int, token: int) -> float:
    """What a selector adds to the logit of one guess below one parent."""
    above = tensors["selector.parent"][parent].double() * tensors["selector.depth"][head].double()
    return float((above * tensors["selector.child"][token].double()).sum())


def ranking(heads: HeadsCheckpoint, head: int, row: Tensor, parent: int) -> list[int]:
    """Tokens of the target's vocabulary from a head's logits [V] of one request, best first."""
    by_draft_id = heads.tensors.get("token_map", torch.arange(len(row))).tolist()
    order = sorted(range(len(row)), key=lambda i: -float(row[i]))
    tokens = [by_draft_id[i] for i in order]
    if heads.spec.selector_rank is None:
        return tokens
    score = {
        token: float(row[i]) * heads.spec.logit_scale + term(heads.tensors, head, parent, token)
        for i, token in list(zip(order, tokens, strict=True))[:NUM_CANDIDATES]
    }
    return sorted(score, key=lambda token: -score[token]) + tokens[NUM_CANDIDATES:]


def below(heads: HeadsCheckpoint, head: int, row: Tensor, parent: int) -> dict[int, float]:
    """Log-probability of each token below one parent, in the selector's order."""
    by_draft_id = heads.tensors.get("token_map", torch.arange(len(row))).tolist()
    logits = {t: float(row[i]) * heads.spec.logit_scale for i, t in enumerate(by_draft_id)}
    order = ranking(heads, head, row, parent)
    if heads.spec.selector_rank is not None:
        for token in order[:NUM_CANDIDATES]:
            logits[token] += term(heads.tensors, head, parent, token)
    total = torch.tensor(list(logits.values()), dtype=torch.float64).logsumexp(0)
    return {token: logits[token] - float(total) for token in order}


def draft(heads: HeadsCheckpoint, rows: Tensor, root: int, paths: Sequence[TreePath]) -> list[int]:
    """The token of each node of a tree, by the heads' logits [K, V] for one request."""
    found: dict[TreePath, int] = {(): root}
    for path in paths:
        head = len(path) - 1
        found[path] = ranking(heads, head, rows[head], found[path[:-1]])[path[-1]]
    return [found[path] for path in paths]
