"""A request's own ``max_nodes`` with asynchronous scheduling.

Model Runner V2 drafts the same number of nodes for every request of a batch. The scheduler decides
how many of them each request runs. In the order of the nodes the first ones, however many, are a
tree.
"""

from __future__ import annotations

from typing import Any

from vllm_medusa.plugin.identity import is_medusa
from vllm_medusa.plugin.sampling_params import RequestOptions


def wrap_update_after_schedule(original: Any) -> Any:
    """Plan at most ``max_nodes`` drafts for a request's next step."""

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
