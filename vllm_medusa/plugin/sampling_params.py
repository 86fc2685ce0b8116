"""Which sampling parameters a request may use with draft trees."""

from __future__ import annotations

import json
from typing import Any

from vllm_medusa.errors import shown
from vllm_medusa.plugin.identity import is_medusa

#: Key of ``SamplingParams.extra_args`` (over HTTP, of ``vllm_xargs``) for a request's own bounds.
EXTRA_ARGS_KEY = "medusa"


def max_nodes_of(sampling_params: Any) -> int | None:
    """Return the most draft nodes that a request wants; None if it does not say."""
    if sampling_params is None or not sampling_params.extra_args:
        return None
    given = _parsed(sampling_params.extra_args.get(EXTRA_ARGS_KEY))
    return None if given is None else int(given["max_nodes"])


def check_extra_args(sampling_params: Any) -> None:
    """Check a request's ``extra_args={"medusa": {"max_nodes": N}}``.

    HTTP has no dictionaries there (``vllm_xargs``): a JSON text is taken as well.

    Raises:
        VLLMValidationError: naming what is wrong; it ends that request only.

    """
    from vllm.exceptions import VLLMValidationError

    given = (sampling_params.extra_args or {}).get(EXTRA_ARGS_KEY)
    if given is None:
        return
    values = _parsed(given)
    nodes = values.get("max_nodes") if isinstance(values, dict) and len(values) == 1 else None
    if type(nodes) is not int or nodes < 0:
        raise VLLMValidationError(
            f"extra_args[{EXTRA_ARGS_KEY!r}]={shown(given)} is not known; give "
            "{'max_nodes': N} with N of 0 (no drafts) or more",
            parameter="extra_args",
            value=None,
        )


def _parsed(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def wrap_validate_spec_decode(original: Any) -> Any:
    """Allow ``min_p`` and ``logit_bias``, and refuse what a tree cannot honour.

    vLLM refuses the two with any speculation (``SamplingParams._validate_spec_decode``); our
    sampler takes each node's token from its own processed distribution, so they just work.
    """
    from vllm.exceptions import VLLMValidationError

    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not is_medusa(speculative_config):
            original(self, speculative_config)
            return
        check_extra_args(self)
        if self.thinking_token_budget is not None:
            raise VLLMValidationError(
                f"thinking_token_budget={self.thinking_token_budget} is not supported with "
                "Medusa draft trees; leave it out or serve without speculative_config.",
                parameter="thinking_token_budget",
                value=self.thinking_token_budget,
            )

    return _validate_spec_decode
