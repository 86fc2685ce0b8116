"""A request's own ``max_nodes`` where the scheduler counts drafts ahead: asynchronous scheduling.

Model Runner V2 drafts as many nodes for every request of a batch; the scheduler says how many of
them each request runs. The nodes are in an order in which the first ones, however many, are a tree.
"""

from __future__ import annotations

from typing import Any

from vllm_medusa.plugin.identity import is_medusa
from vllm_medusa.plugin.sampling_params import RequestOptions


def wrap_update_after_schedule(original: Any) -> Any:
    """Plan no more drafts for a request's next step than it wants."""

    def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        if not is_medusa(self.vllm_config.speculative_config):
            return
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[req_id]
            most = RequestOptions.of(request.sampling_params).max_nodes
            if most is not None:
                request.spec_token_ids = request.spec_token_ids[:most]

    return _update_after_schedule
