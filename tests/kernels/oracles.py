"""What the kernels compute, slowly and obviously, in Python and torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.cases import Case
from vllm_medusa.kernels import NO_TREE
from vllm_medusa.kernels.attention import Features, Step


def has_tree(case: Case, req: int) -> bool:
    start = int(case.seq_lens[req]) - case.num_logits[req]
    return case.num_logits[req] > 1 and start >= int(case.prefill_len[case.idx_mapping[req]])


def prepare(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, ancestors, bases and lengths of context of a case."""
    positions, seen = case.positions.clone(), case.token_ancestors.clone()
    base, context_lens = torch.full_like(case.base, NO_TREE), torch.zeros_like(case.base)
    for req in range(case.num_reqs):
        context_lens[req] = case.seq_lens[req] - case.query_lens[req]
        if has_tree(case, req):
            count, state = case.num_logits[req], int(case.idx_mapping[req])
            base[req] = case.seq_lens[req] - count
            tokens = slice(int(case.query_start_loc[req]), int(case.query_start_loc[req + 1]))
            positions[tokens] = base[req] + case.depths[state, :count]
            seen[tokens] = case.ancestors[state, :count]
    return positions, seen, base, context_lens


def accept(case: Case, drafts: Tensor, targets: Tensor, max_depth: int) -> list[list[int]]:
    """The accepted nodes of each request, the root first."""
    paths = []
    for req in range(case.num_reqs):
        start, parents = int(case.cu_num_logits[req]), case.parents[case.idx_mapping[req]].tolist()
        count = case.num_logits[req] if has_tree(case, req) else 1
        path = [0]
        while len(path) <= max_depth:
            token = int(targets[start + path[-1]])
            children = [
                node
                for node in range(1, count)
                if parents[node] == path[-1] and int(drafts[start + node]) == token
            ]
            if not children:
                break
            path.append(children[0])
        paths.append(path)
    return paths


def compact(case: Case, cache: Tensor, slots: Tensor, paths: list[list[int]]) -> Tensor:
    """The cache afterwards; it is [blocks, heads, tokens of a block, content]."""
    before, after = cache.clone(), cache.clone()
    size = cache.shape[2]
    for req, path in enumerate(paths):
        first = int(case.logits_indices[case.cu_num_logits[req]])
        for depth, node in enumerate(path):
            a, b = int(slots[first + node]), int(slots[first + depth])
            after[b // size, :, b % size] = before[a // size, :, a % size]
    return after


def path_tokens(case: Case, tokens: Tensor, req: int, node: int) -> list[int]:
    """Drafted tokens on the way from the root to a node, the root's left out."""
    parents, start = case.parents[case.idx_mapping[req]].tolist(), int(case.cu_num_logits[req])
    path: list[int] = []
    while node > 0:
        path.insert(0, int(tokens[start + node]))
        node = parents[node]
    return path


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    step: Step,
    scale: float,
    features: Features = Features(),  # noqa: B008 - it cannot be changed
    workspace: object = None,
    wanted_programs: int = 1,
    context_lse: Tensor | None = None,
) -> None:
    """`tree_attention`, request by request, in float32."""
    starts = step.query_start_loc.tolist()
    for req, seq_len in enumerate(step.seq_lens.tolist()):
        queries = slice(starts[req], starts[req + 1])
        if queries.start == queries.stop:
            continue
        key, value = _keys_and_values(key_cache, value_cache, step, req, seq_len, features)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", query[queries].float(), key) * scale
        scores, seen = _bent_and_seen(scores, step, req, queries, seq_len, features)
        num_queries = queries.stop - queries.start
        none = torch.full_like(scores[..., :1], float("-inf"))
        sink = none
        if features.sinks is not None:
            sink = features.sinks.float()[:, None, None].expand_as(none)
        before = none
        if context_lse is not None:
            seen[:, : seq_len - num_queries] = False
            before = context_lse[:, queries, None].float()
            before = torch.where(before.isinf(), none, before)
        scores = scores.masked_fill(~seen, float("-inf"))
        weights = torch.cat([scores, sink, before], -1).softmax(-1)
        found = torch.einsum("hts,shd->thd", weights[..., :-2], value)
        found += (weights[..., -1:].transpose(0, 1) * out[queries].float()).nan_to_num()
        out[queries] = found.to(out.dtype)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    scale: float,
    softcap: float = 0.0,
    *,
    is_causal: bool = False,
    window: int = 0,
) -> Tensor:
    """Attention as other kernels have it, FlashAttention for one.

    Args:
        query: [T, Hq, D].
        key_cache: [blocks, tokens of a block, Hkv, D].
        value_cache: likewise.
        out: [T, Hq, D], written; zeros where there are no keys.
        query_start_loc: [B + 1] first query of each request.
        seq_lens: [>= B] keys of each request.
        block_table: [B, blocks].
        scale: factor on the products.
        softcap: 0: none.
        is_causal: the last query is at the last key.
        window: with it, number of keys that a query sees, the one at it included; 0: all.

    Returns:
        [Hq, T] float32 log-sum-exp of the scores; minus infinity where there are no keys.

    """
    starts, size = query_start_loc.tolist(), key_cache.shape[1]
    group = query.shape[1] // key_cache.shape[2]
    lse = torch.full(query.shape[1::-1], float("-inf"), device=query.device)
    for req, seq_len in enumerate(seq_lens.tolist()[: len(starts) - 1]):
        queries, keys = slice(starts[req], starts[req + 1]), torch.arange(seq_len).to(query.device)
        page = block_table[req, keys // size].long()
        key = key_cache[page, keys % size].float().repeat_interleave(group, 1)
        value = value_cache[page, keys % size].float().repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", query[queries].float(), key) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if is_causal:
            last = torch.arange(seq_len - queries.stop + queries.start, seq_len).to(query.device)
            unseen = keys > last[:, None]
            if window:
                unseen |= keys <= last[:, None] - window
            scores = scores.masked_fill(unseen, float("-inf"))
        lse[:, queries] = scores.logsumexp(-1)
        weights = scores.softmax(-1)
        out[queries] = torch.einsum("hts,shd->thd", weights, value).to(out.dtype)
    return lse


def _keys_and_values(
    key_cache: Tensor, value_cache: Tensor, step: Step, req: int, seq_len: int, features: Features
) -> tuple[Tensor, Tensor]:
    """[S, heads, D] float32 keys and values of a request, multiplied with their scales."""
    keys = torch.arange(seq_len, device=key_cache.device)
    size = key_cache.shape[1]
    page, inside = step.block_table[req, keys // size].long(), keys % size
    key, value = key_cache[page, inside].float(), value_cache[page, inside].float()
    scales = features.scales
    if scales is None:
        return key, value
    if scales.kind == 1:
        return key * scales.key, value * scales.value
    return key * scales.key[page, inside][..., None], value * scales.value[page, inside][..., None]


def _bent_and_seen(
    scores: Tensor, step: Step, req: int, queries: slice, seq_len: int, features: Features
) -> tuple[Tensor, Tensor]:
    """Scores with soft cap and ALiBi, and [T, S] what each query may see."""
    num_queries = queries.stop - queries.start
    keys = torch.arange(seq_len, device=scores.device)
    context = seq_len - num_queries
    node = keys - int(step.base[req])
    key_position = keys.clone()
    for key in keys[node >= 0].tolist():
        key_position[key] = step.positions[queries.start + int(node[key])]
    position = step.positions[queries]
    distance = position[:, None] - key_position
    slot = context + torch.arange(num_queries, device=scores.device)
    bit = (step.ancestors[queries, None] >> node.clamp(0, 63)) & 1
    seen = (keys <= slot[:, None]) & ((node < 0) | (bit == 1))
    if features.window:
        seen &= distance < features.window
    if features.softcap:
        scores = features.softcap * torch.tanh(scores / features.softcap)
    if features.slopes is not None:
        offset = (key_position - context).expand_as(distance).float()
        if features.slopes_of_root:
            offset = -distance.clamp(min=0).float().sqrt()
        scores = scores + features.slopes[:, None, None] * offset
    return scores, seen
