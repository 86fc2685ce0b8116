"""Which sampling parameters a request may use with draft trees."""

from __future__ import annotations

from typing import Any

from vllm_medusa.plugin.compat import patch
from vllm_medusa.plugin.identity import is_medusa


def patch_validation() -> None:
    """Allow ``min_p`` and ``logit_bias``, and refuse what a tree cannot honour.

    vLLM refuses the two with any speculation (``SamplingParams._validate_spec_decode``); our
    sampler takes each node's token from its own processed distribution, so they just work.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    def wrap(original: Any) -> Any:
        def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
            if not is_medusa(speculative_config):
                original(self, speculative_config)
            elif self.thinking_token_budget is not None:
                raise VLLMValidationError(
                    f"thinking_token_budget={self.thinking_token_budget} is not supported with "
                    "Medusa draft trees; leave it out or serve without speculative_config.",
                    parameter="thinking_token_budget",
                    value=self.thinking_token_budget,
                )

        return _validate_spec_decode

    patch(SamplingParams, "_validate_spec_decode", ["self", "speculative_config"], wrap)
