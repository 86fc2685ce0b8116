"""Grammars over trees: each node's mask follows the node's own path.

vLLM walks a request's drafts as a chain, in the engine core (``v1/structured_output``). In a tree
the siblings would then be masked by one another's state. Here the walk goes down and up the tree
instead. A node that its grammar forbids needs no pruning: its parent's mask forbids its token, so
the target never takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_medusa.plugin.compat import patch, vllm_version
from vllm_medusa.plugin.core.draft_parents import parents_of
from vllm_medusa.plugin.identity import masks_trees
from vllm_medusa.tree.step_trees import depth_first_nodes


def patch_structured_output() -> None:
    """Patch ``StructuredOutputManager.grammar_bitmask`` and ``validate_tokens``."""
    from vllm.v1.structured_output import StructuredOutputManager

    def wrap_bitmask(original: Any) -> Any:
        def grammar_bitmask(
            self: Any,
            requests: dict[str, Any],
            structured_output_request_ids: list[str],
            scheduled_spec_decode_tokens: dict[str, list[int]],
        ) -> Any:
            if not structured_output_request_ids or not _masks_trees(self):
                return original(
                    self, requests, structured_output_request_ids, scheduled_spec_decode_tokens
                )
            return _tree_bitmask(
                self, requests, structured_output_request_ids, scheduled_spec_decode_tokens
            )

        return grammar_bitmask

    def wrap_validate(original: Any) -> Any:
        def validate_tokens(self: Any, request: Any, spec_tokens: list[int]) -> list[int]:
            if request.use_structured_output and _masks_trees(self):
                return spec_tokens
            return original(self, request, spec_tokens)

        return validate_tokens

    patch(
        StructuredOutputManager,
        "grammar_bitmask",
        ["self", "requests", "structured_output_request_ids", "scheduled_spec_decode_tokens"],
        wrap_bitmask,
    )
    patch(
        StructuredOutputManager,
        "validate_tokens",
        ["self", "request", "spec_tokens"],
        wrap_validate,
    )


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
    has_fixed_rows = not vllm_version().startswith("0.32")
    row = 0
    for req_id in req_ids:
        request, tokens = requests[req_id], drafts.get(req_id, [])
        grammar = request.structured_output_request.grammar
        parents = parents_of(request, tokens)
        _fill_tree(manager, grammar, req_id, tokens, parents, row)
        row += num_nodes if has_fixed_rows else 1 + len(tokens)
    return manager._grammar_bitmask[:row].numpy()


def _fill_tree(
    manager: Any,
    grammar: Any,
    req_id: str,
    tokens: Sequence[int],
    parents: Sequence[int],
    first_row: int,
) -> None:
    """Fill the rows of one request; the grammar is left in the state it was in.

    ``entered`` is the path of nodes whose tokens the grammar has taken. The nodes are visited in
    depth-first order, in which a node's parent is on the path to the node before it.
    """
    _fill_row(manager, grammar, first_row, True)
    entered = [0]
    for node in depth_first_nodes(parents):
        parent, token = parents[node - 1], tokens[node - 1]
        allowed = False
        if parent in entered:
            above = entered.index(parent) + 1
            if above < len(entered):
                grammar.rollback(len(entered) - above)
                del entered[above:]
            allowed = (
                token >= 0
                and not grammar.is_terminated()
                and bool(grammar.validate_tokens([token]))
                and grammar.accept_tokens(req_id, [token])
            )
        if allowed:
            entered.append(node)
        # A forbidden node is never reached: any mask will do.
        _fill_row(manager, grammar, first_row + node, allowed)
    if len(entered) > 1:
        grammar.rollback(len(entered) - 1)


def _fill_row(manager: Any, grammar: Any, row: int, is_constrained: bool) -> None:
    """Fill one row as ``StructuredOutputManager._fill_bitmasks`` does."""
    if is_constrained and not grammar.is_terminated():
        grammar.fill_bitmask(manager._grammar_bitmask, row)
    else:
        manager._grammar_bitmask[row].fill_(manager._full_mask)
