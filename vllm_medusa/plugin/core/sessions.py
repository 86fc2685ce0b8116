"""Streaming-input sessions (``StreamingInput``): one request that goes on with further input.

A session stops like any request, at a stop token say, and goes on from its tokens in the KV cache:
all but the last. An accepted path may hold more tokens behind the one that stopped it. vLLM leaves
them out of the text; before 0.33 it counts them as computed all the same, and the session goes on
with K/V that are not its own. What a worker holds is put right in `v1.runner`.
"""

from __future__ import annotations

from typing import Any

from vllm_medusa.plugin.identity import medusa_config_of


def wrap_update_request_with_output(original: Any) -> Any:
    """Count the tokens that a stop has left out as not computed, as vLLM 0.33 does.

    Patches ``Scheduler._update_request_with_output``. With asynchronous scheduling they are not
    counted: they stay among the request's ``num_output_placeholders``.
    """

    def _update_request_with_output(
        self: Any, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        num_accepted = len(new_token_ids)
        kept, is_stopped = original(self, request, new_token_ids, *args, **kwargs)
        if (
            request.resumable
            and not self.scheduler_config.async_scheduling
            and medusa_config_of(self.vllm_config) is not None
        ):
            request.num_computed_tokens -= num_accepted - len(kept)
        return kept, is_stopped

    return _update_request_with_output
