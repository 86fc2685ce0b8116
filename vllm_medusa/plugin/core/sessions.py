"""Streaming-input sessions (``StreamingInput``): a request that continues with more input.

A session stops like any request, for instance at a stop token. It continues from its tokens in the
KV cache, which are all except the last. An accepted path can hold more tokens after the one that
stopped the session. vLLM leaves them out of the text. But vLLM 0.32 counts them as computed, so the
session would continue with wrong K/V. `v1.runner` corrects the state of the worker.
"""

from __future__ import annotations

from typing import Any

from vllm_medusa.plugin.identity import medusa_config_of


def wrap_update_request_with_output(original: Any) -> Any:
    """Count the tokens after a stop as not computed, as vLLM 0.33 does.

    Patches ``Scheduler._update_request_with_output``. With asynchronous scheduling these tokens
    are not counted as computed anyway: they stay in the request's ``num_output_placeholders``.
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
