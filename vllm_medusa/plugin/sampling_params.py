"""Sampling parameters of requests with draft trees, and a request's own options."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from vllm_medusa.config import (
    POSTERIOR_KEYS,
    TYPICAL,
    check_posterior,
    is_acceptance,
    typical_rule,
)
from vllm_medusa.errors import UserError, shown
from vllm_medusa.plugin.identity import is_medusa
from vllm_medusa.tree.typical import TypicalRule

#: Key of ``SamplingParams.extra_args`` (over HTTP, of ``vllm_xargs``) for a request's own options.
EXTRA_ARGS_KEY = "medusa"
#: Temperatures below are greedy, as in ``SamplingParams``.
SAMPLING_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """A request's own options; None: not given.

    Attributes:
        max_nodes: most draft nodes of its trees.
        acceptance: ``"lossless"`` or ``"typical"``.
        posterior_threshold, posterior_alpha: for typical acceptance, as in `TypicalRule`.

    """

    max_nodes: int | None = None
    acceptance: str | None = None
    posterior_threshold: float | None = None
    posterior_alpha: float | None = None

    @classmethod
    def of(cls, sampling_params: Any) -> RequestOptions:
        """Read the checked parameters of a request."""
        if sampling_params is None or not sampling_params.extra_args:
            return _NOTHING_SAID
        given = _parsed(sampling_params.extra_args.get(EXTRA_ARGS_KEY))
        return _NOTHING_SAID if given is None else cls(**given)


_NOTHING_SAID = RequestOptions()
_KEYS = {field.name for field in dataclasses.fields(RequestOptions)}


def typical_rule_of(sampling_params: Any, default: TypicalRule | None) -> TypicalRule | None:
    """Return a request's rule of typical acceptance; None: lossless, as greedy requests always are.

    Args:
        sampling_params: of the request.
        default: the engine's rule.

    """
    if sampling_params is None or sampling_params.temperature < SAMPLING_EPS:
        return None
    options = RequestOptions.of(sampling_params)
    return default if options.acceptance is None else typical_rule(options)


def check_extra_args(sampling_params: Any) -> None:
    """Check a request's ``extra_args={"medusa": {"max_nodes": N, "acceptance": ...}}``.

    Over HTTP (``vllm_xargs``) values cannot be dictionaries, so a JSON text is accepted too.

    Raises:
        VLLMValidationError: naming what is wrong; it ends that request only.

    """
    from vllm.exceptions import VLLMValidationError

    given = (sampling_params.extra_args or {}).get(EXTRA_ARGS_KEY)
    if given is None:
        return
    try:
        _check_options(_parsed(given), sampling_params)
    except UserError as error:
        raise VLLMValidationError(
            f"extra_args[{EXTRA_ARGS_KEY!r}]={shown(given)}: {error}",
            parameter="extra_args",
            value=None,
        ) from None


def _check_options(values: Any, sampling_params: Any) -> None:
    """Check a request's own values.

    Raises:
        UserError: if one is not allowed.

    """
    if not isinstance(values, dict) or not values or not values.keys() <= _KEYS:
        raise UserError(f"it is unknown; give a dictionary with some of {', '.join(sorted(_KEYS))}")
    nodes = values.get("max_nodes", 0)
    if type(nodes) is not int or nodes < 0:
        raise UserError(f"max_nodes={shown(nodes)} must be 0 (no drafts) or a larger integer")
    acceptance = values.get("acceptance")
    if "acceptance" in values and not is_acceptance(acceptance):
        raise UserError(f"acceptance={shown(acceptance)} must be 'lossless' or 'typical'")
    check_posterior(acceptance, {key: values[key] for key in POSTERIOR_KEYS if key in values})
    if acceptance == TYPICAL and sampling_params.temperature < SAMPLING_EPS:
        raise UserError(
            f"acceptance='typical' is for sampling, but temperature={sampling_params.temperature} "
            "is greedy; leave acceptance out"
        )


def _parsed(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def wrap_validate_spec_decode(original: Any) -> Any:
    """Allow ``min_p`` and ``logit_bias``, and refuse what trees do not support.

    vLLM refuses both with any speculation (``SamplingParams._validate_spec_decode``). Our sampler
    takes each node's token from the node's own processed distribution, so trees support them.
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
