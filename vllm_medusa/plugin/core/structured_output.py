"""Grammars over trees: each node's mask follows the node's own path.

vLLM walks a request's drafts as a chain, in the engine core (``v1/structured_output``). In a tree
the siblings would then be masked by one another's state. Here the walk goes down and up the tree
instead. A node that its grammar forbids needs no pruning: its parent's mask forbids its token, so
the target never takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_medusa.plugin.compat import minor_version
from vllm_medusa.plugin.core.draft_parents import parents_of
from vllm_medusa.plugin.identity import masks_trees, medusa_config_of


def wrap_grammar_bitmask(original: Any) -> Any:
    """Mask trees where requests draft them."""

    def grammar_bitmask(
        self: Any,
        requests: dict[str, Any],
        structured_output_request_ids: list[str],
        scheduled_spec_decode_tokens: dict[str, list[int]],
    ) -> Any:
        fill = _tree_bitmask if structured_output_request_ids and _masks_trees(self) else original
        return fill(self, requests, structured_output_request_ids, scheduled_spec_decode_tokens)

    return grammar_bitmask


def wrap_validate_tokens(original: Any) -> Any:
    """Leave drafts whole where they are trees."""

    def validate_tokens(self: Any, request: Any, spec_tokens: list[int]) -> list[int]:
        if request.use_structured_output and _masks_trees(self):
            return spec_tokens
        return original(self, request, spec_tokens)

    return validate_tokens


def wrap_create_grammar(original: Any) -> Any:
    """Have grammars take accepted paths that run on behind their end."""

    def _create_grammar(self: Any, request: Any) -> Any:
        grammar = original(self, request)
        if medusa_config_of(self.vllm_config) is not None:
            stop_at_the_end(grammar)
        return grammar

    return _create_grammar


def stop_at_the_end(grammar: Any) -> None:
    """Have a grammar ignore what an accepted path holds behind the grammar's end.

    Given one token a step, vLLM's grammars ignore all behind their end, and the request goes on
    without one (``ignore_eos``). Given several at once, ``GuidanceGrammar`` refuses those behind
    the end, and the request ends with an error.
    """
    accept = grammar.accept_tokens

    def accept_tokens(request_id: str, tokens: list[int]) -> bool:
        return all(grammar.is_terminated() or accept(request_id, [token]) for token in tokens)

    grammar.accept_tokens = accept_tokens


def _masks_trees(manager: Any) -> bool:
    """`masks_trees` of a manager's configuration, looked up once: this runs at every step."""
    known: bool | None = getattr(manager, "_medusa_masks_trees", None)
    if known is None:
        known = manager._medusa_masks_trees = masks_trees(manager.vllm_config)
    return known


def _tree_bitmask(
    manager: Any,
    requests: dict[str, Any],
    req_ids: Sequence[str],
    drafts: dict[str, list[int]],
) -> Any:
    """Return the packed masks of all rows: each request's root, then its drafts."""
    # As many as the speculative configuration says: the most that a tree may have.
    num_nodes = 1 + manager.vllm_config.speculative_config.num_speculative_tokens
    if manager._grammar_bitmask is None:
        rows = manager.vllm_config.scheduler_config.max_num_seqs * num_nodes
        manager._grammar_bitmask = manager.backend.allocate_token_bitmask(rows)
    # Each request has as many rows as it has drafts in vLLM 0.32, and equally many in 0.33.
    has_fixed_rows = minor_version() != "0.32"
    row = 0
    for req_id in req_ids:
        request, tokens = requests[req_id], drafts.get(req_id, [])
        grammar = request.structured_output_request.grammar
        parents = parents_of(request, tokens)
        fill_tree(manager._grammar_bitmask[row:], grammar, req_id, tokens, parents)
        row += num_nodes if has_fixed_rows else 1 + len(tokens)
    return manager._grammar_bitmask[:row].numpy()


def fill_tree(
    bitmask: Any, grammar: Any, req_id: str, tokens: Sequence[int], parents: Sequence[int]
) -> None:
    """Fill the masks of one request's nodes; the grammar is left in the state it was in.

    Each node gets the mask that vLLM would give it without speculation, had the request arrived
    there. A node that no request can arrive at gets its parent's mask.

    Args:
        bitmask: [>= 1 + D, words] int32 masks, 32 tokens a word, to be filled: node ``i`` is row
            ``i``, the root row 0. A tensor on the host.
        grammar: a ``StructuredOutputGrammar`` (``v1/structured_output/backend_types.py``) in the
            state of the root.
        req_id: of the request.
        tokens: [D] token of each draft node; -1 for none.
        parents: [>= D] parent of each draft node, an index of ``bitmask``; parents before children.

    """
    rows = bitmask.numpy()
    children: list[list[int]] = [[] for _ in range(len(tokens) + 1)]
    for node, parent in zip(range(1, len(tokens) + 1), parents, strict=False):
        children[parent].append(node)
    is_filled = np.zeros(len(tokens) + 1, dtype=bool)
    # The nodes whose parent the grammar is at or has been at, and how deep they are; the last one
    # is next, so that the walk is depth-first.
    waiting = [(0, 0)]
    # Nodes below the root whose tokens the grammar has taken.
    entered = 0
    while waiting:
        node, depth = waiting.pop()
        if node:
            token = tokens[node - 1]
            if not _permits(rows[parents[node - 1]], token):
                continue
            if entered >= depth:
                grammar.rollback(entered - depth + 1)
            entered = depth - 1
            if not grammar.accept_tokens(req_id, [token]):
                continue
            entered = depth
        is_filled[node] = True
        if grammar.is_terminated():
            # From here on the request is free; the nodes below get this row, too.
            rows[node] = -1
        else:
            grammar.fill_bitmask(bitmask, node)
            waiting += [(child, depth + 1) for child in reversed(children[node])]
    if entered:
        grammar.rollback(entered)
    for node in np.flatnonzero(~is_filled):
        rows[node] = rows[parents[node - 1]]


def _permits(row: Any, token: int) -> bool:
    return token >= 0 and bool(row[token >> 5] >> (token & 31) & 1)
