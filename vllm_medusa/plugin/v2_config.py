"""Model Runner V2 for our method: what vLLM would refuse, and the settings that trees need.

vLLM has lists of the names of speculative methods that V2 and asynchronous scheduling support. Our
method has the name ``custom_class`` there. vLLM still decides whether V2 is used.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

from vllm_medusa.config import MedusaConfig
from vllm_medusa.plugin.compat import replaced
from vllm_medusa.plugin.identity import medusa_config_of

_REFUSAL = "speculative method 'custom_class'"


def wrap_unsupported_features(original: Any) -> Any:
    """Add our method to those that V2 supports. Every process calls this often."""

    def _get_v2_model_runner_unsupported_features(self: Any) -> list[str]:
        features = original(self)
        if medusa_config_of(self) is None:
            return features
        return [feature for feature in features if feature != _REFUSAL]

    return _get_v2_model_runner_unsupported_features


def wrap_post_init(original: Any) -> Any:
    """Make the settings that trees need on V2.

    Trees by batch size, and asynchronous scheduling, which 0.32 allows for the methods in a list
    that it looks up as a global name.
    """

    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        config = medusa_config_of(self)
        if config is None or not self.use_v2_model_runner:
            original(self, *args, **kwargs)
            return
        _set_sizes(self, config)
        with _asynchronous_scheduling():
            original(self, *args, **kwargs)

    return __post_init__


def _set_sizes(vllm_config: Any, config: MedusaConfig) -> None:
    """Give V2 the numbers of drafts by batch size; it schedules, captures and pads by them."""
    if config.sizes_by_batch is not None:
        vllm_config.speculative_config.num_speculative_tokens_per_batch_size = [
            tuple(size) for size in config.sizes_by_batch
        ]


def _asynchronous_scheduling() -> ExitStack:
    """Add our method in 0.32 to those of whose drafts the scheduler knows only the number."""
    from vllm.config import vllm as module

    stack = ExitStack()
    if hasattr(module, "NgramGPUTypes"):
        names = Literal["ngram_gpu", "custom_class"]
        stack.enter_context(replaced(module, "NgramGPUTypes", names))
    return stack
