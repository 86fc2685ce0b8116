"""Grammars over trees: each node's mask follows the node's own path.

vLLM treats a request's drafts as a chain, in the engine core (``v1/structured_output``). In a tree
a node would then be masked after its siblings' tokens. Here the walk is depth-first, down and up
the tree. A node that the grammar forbids need not be removed: its parent's mask forbids its token,
so the target never takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_medusa.plugin.compat import minor_version
from vllm_medusa.plugin.core.draft_parents import parents_of
from vllm_medusa.plugin.identity import masks_trees, medusa_config_of


def wrap_grammar_bitmask(original: Any) -> Any:
    """Mask the drafts as trees."""

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
    """Do not cut drafts that are trees."""

    def validate_tokens(self: Any, request: Any, spec_tokens: list[int]) -> list[int]:
        if request.use_structured_output and _masks_trees(self):
            return spec_tokens
        return original(self, request, spec_tokens)

    return validate_tokens


def wrap_create_grammar(original: Any) -> Any:
    """Let grammars accept paths that continue after the grammar's end."""

    def _create_grammar(self: Any, request: Any) -> Any:
        grammar = original(self, request)
        if medusa_config_of(self.vllm_config) is not None:
            stop_at_the_end(grammar)
        return grammar

    return _create_grammar


def stop_at_the_end(grammar: Any) -> None:
    """Let a grammar ignore the tokens of an accepted path after the grammar's end.

    If they get one token for each step, vLLM's grammars ignore everything after their end, and the
    request continues without a grammar (``ignore_eos``). If it gets several tokens at once,
    ``GuidanceGrammar`` refuses those after the end, and the request ends with an error.
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
    # The number of the speculative configuration: the most nodes of a tree.
    num_nodes = 1 + manager.vllm_config.speculative_config.num_speculative_tokens
    if manager._grammar_bitmask is None:
        rows = manager.vllm_config.scheduler_config.max_num_seqs * num_nodes
        manager._grammar_bitmask = manager.backend.allocate_token_bitmask(rows)
    # In vLLM 0.32 a request has a row for each of its drafts; in 0.33 all requests have equally
    # many.
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
    """Fill the masks of one request's nodes; the grammar's state is the same afterwards.

    Each node gets the mask that vLLM would use without speculation if the node's path were the
    text. A node whose path the grammar forbids gets its parent's mask.

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
    # Nodes whose parent the grammar has reached, with their depths; the last one is next, so the
    # walk is depth-first.
    waiting = [(0, 0)]
    # Nodes below the root whose tokens the grammar has accepted.
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
            # From here on the request has no grammar; the nodes below get this row too.
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
