"""Sends the parents of a draft tree from the worker to the engine core.

vLLM sends a request's draft tokens as a plain list. Only grammars need the whole tree. So for
requests with structured outputs the worker also sends the parents of the drafts, as an attribute of
the ``DraftTokenIds``, and the scheduler keeps them with the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Attribute of ``DraftTokenIds``: parents of draft nodes by request id.
_SENT = "medusa_parents"
#: Attribute of ``Request``.
_KEPT = "_medusa_parents"


def send_parents(draft_token_ids: Any, parents: dict[str, tuple[int, ...]]) -> None:
    """Put parents of draft nodes, by request id, into a worker's message."""
    setattr(draft_token_ids, _SENT, parents)


def parents_of(request: Any, tokens: Sequence[int]) -> Sequence[int]:
    """Return the parents of a request's scheduled drafts; 0 is the root.

    Args:
        request: the scheduler's request.
        tokens: its drafts; the scheduler can have cut the last ones. For placeholders (-1), which
            no worker has drafted, the parent is always the root.

    """
    if not tokens or tokens[0] < 0:
        return (0,) * len(tokens)
    parents: tuple[int, ...] = getattr(request, _KEPT)
    return parents[: len(tokens)]


def wrap_update_draft_token_ids(original: Any) -> Any:
    """Keep the parents that come with drafts, on both ways to the scheduler.

    ``update_draft_token_ids_in_output`` (``v1/core/sched/scheduler.py``) is the way of asynchronous
    scheduling, where the drafts arrive after their step has been scheduled.
    """

    def update(self: Any, draft_token_ids: Any, *args: Any) -> None:
        original(self, draft_token_ids, *args)
        for req_id, parents in getattr(draft_token_ids, _SENT, {}).items():
            if req_id in self.requests:
                setattr(self.requests[req_id], _KEPT, parents)

    return update
