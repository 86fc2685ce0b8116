"""The way of a draft tree's parents from the worker to the engine core.

vLLM sends a request's draft tokens there as a plain list. Only grammars need to know more of the
tree. So the worker sends the parents of the drafts of requests with structured outputs along, as an
attribute of the ``DraftTokenIds``, and the scheduler keeps them with the request.
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
        request: of the scheduler.
        tokens: its drafts, of which the scheduler may have cut the last. Placeholders (-1), which
            no worker has drafted, all hang below the root.

    """
    if not tokens or tokens[0] < 0:
        return (0,) * len(tokens)
    parents: tuple[int, ...] = getattr(request, _KEPT)
    return parents[: len(tokens)]


def wrap_update_draft_token_ids(original: Any) -> Any:
    """Keep the parents that come with drafts, on either way by which these get to the scheduler.

    ``update_draft_token_ids_in_output`` (``v1/core/sched/scheduler.py``) is that of asynchronous
    scheduling, to which the drafts come when their step is scheduled already.
    """

    def update(self: Any, draft_token_ids: Any, *args: Any) -> None:
        original(self, draft_token_ids, *args)
        for req_id, parents in getattr(draft_token_ids, _SENT, {}).items():
            if req_id in self.requests:
                setattr(self.requests[req_id], _KEPT, parents)

    return update
