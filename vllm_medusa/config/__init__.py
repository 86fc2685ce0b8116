"""The plugin's configuration: the user's options, and the resolved values of all processes."""

from vllm_medusa.config.choice import TreeChoice, resolve_tree
from vllm_medusa.config.options import (
    POSTERIOR_KEYS,
    TYPICAL,
    MedusaOptions,
    check_posterior,
    is_acceptance,
    typical_rule,
    with_underscores,
)
from vllm_medusa.config.resolved import CONFIG_KEY, MedusaConfig

__all__ = [
    "CONFIG_KEY",
    "POSTERIOR_KEYS",
    "TYPICAL",
    "MedusaConfig",
    "MedusaOptions",
    "TreeChoice",
    "check_posterior",
    "is_acceptance",
    "resolve_tree",
    "typical_rule",
    "with_underscores",
]
