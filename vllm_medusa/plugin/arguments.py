"""The user's way to ask for Medusa: vLLM's ``speculative_config`` with our method and keys.

``EngineArgs.create_engine_config`` is wrapped. The wrapper takes our values out and checks them.
vLLM gets a ``custom_class`` proposer, our worker class and, in ``additional_config``, the resolved
options.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

from vllm_medusa.config import (
    CONFIG_KEY,
    MedusaConfig,
    MedusaOptions,
    resolve_tree,
    typical_rule,
    with_underscores,
)
from vllm_medusa.errors import UserError, shown
from vllm_medusa.heads import HeadsReader
from vllm_medusa.plugin import patches
from vllm_medusa.plugin.compat import check_version, plugin_logger, replaced
from vllm_medusa.plugin.identity import PROPOSER_CLASS, WORKER_CLASS
from vllm_medusa.plugin.one_line_errors import collect_errors
from vllm_medusa.plugin.support import check_asynchronous, check_before, check_supported
from vllm_medusa.tree.named import AUTO, STATIC

METHOD = "medusa"

logger = plugin_logger(__name__)


def wrap_add_cli_args(original: Any) -> Any:
    """Add the method ``medusa`` to the parser of ``EngineArgs`` (``engine/arg_utils.py``)."""

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        for action in parser._actions:
            if action.dest == "speculative_config":
                action.type = _bare_method_or(action.type)
            if action.dest == "spec_method" and action.choices and METHOD not in action.choices:
                action.choices = [*action.choices, METHOD]
        return parser

    return add_cli_args


def _bare_method_or(parse: Any) -> Any:
    """Parse ``--speculative-config medusa``; vLLM itself accepts JSON only."""

    def parse_speculative_config(text: str) -> Any:
        return {"method": METHOD} if text == METHOD else parse(text)

    return parse_speculative_config


def wrap_create_engine_config(original: Any) -> Any:
    """Make vLLM's configuration from arguments that ask for Medusa."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = take_request(self)
        if request is None:
            return original(self, *args, **kwargs)
        check_version()
        check_before(self, WORKER_CLASS)
        heads = _read_heads(self, request)
        config = _resolve(self, request, heads)
        vllm_config = _create(original, self, config, *args, **kwargs)
        if config.dynamic and request.tree == AUTO and vllm_config.use_v2_model_runner:
            config = _resolve(self, _static(request), heads)
            vllm_config = _create(original, self, config, *args, **kwargs)
        if config.typical:
            logger.warning(
                "Medusa: acceptance='typical' is lossy: sampled text does not follow the target's "
                "distribution; acceptance='lossless' keeps it"
            )
        check_asynchronous(self, vllm_config)
        check_supported(vllm_config, config)
        _check_fit(vllm_config, config, heads)
        collect_errors()
        patches.apply("front end")
        # For an engine core in this process, where the plugins are loaded already.
        patches.apply("engine core")
        return vllm_config

    return create_engine_config


def take_request(args: Any) -> MedusaOptions | None:
    """Take our values out of ``EngineArgs``; None if they do not ask for Medusa.

    Raises:
        UserError: if a value is not known, not allowed, or given twice.

    """
    given = {} if args.speculative_config is None else args.speculative_config
    if _is_method(given):
        given = {"method": METHOD}
    if not isinstance(given, dict) or not any(
        map(_is_method, (given.get("method"), getattr(args, "spec_method", None)))
    ):
        return None
    values = with_underscores(given)
    for flag, key in (
        ("spec_method", "method"),
        ("spec_model", "model"),
        ("spec_tokens", "num_speculative_tokens"),
    ):
        value = getattr(args, flag, None)
        if value is None:
            continue
        if key in values:
            raise UserError(
                f"{flag}={shown(value)} and speculative_config[{key!r}]={shown(values[key])} are "
                "both given; remove one of them"
            )
        values[key] = value
    return MedusaOptions.from_dict(values)


def _is_method(value: Any) -> bool:
    """Whether a value, of any type, is our method's name."""
    return isinstance(value, str) and value == METHOD


def _read_heads(args: Any, request: MedusaOptions) -> HeadsReader:
    """Find the heads; only their headers are read here."""
    revision = request.revision if request.model else args.revision
    return HeadsReader(request.model or args.model, revision=revision)


def _resolve(args: Any, request: MedusaOptions, heads: HeadsReader) -> MedusaConfig:
    """Find the tree that the user asked for."""
    choice = resolve_tree(request, heads.spec.num_heads, heads.tree_paths, heads.tree_schedule)
    return MedusaConfig(
        heads=request.model or args.model,
        revision=request.revision if request.model else args.revision,
        tree=choice.tree,
        tree_name=choice.tree_name,
        sizes_by_batch=choice.sizes_by_batch,
        dynamic=choice.dynamic,
        max_tree_requests=request.max_tree_requests,
        typical=typical_rule(request),
        in_turn=heads.spec.is_sequential,
    )


def _static(request: MedusaOptions) -> MedusaOptions:
    """Return the options with the meaning of ``tree="auto"`` on Model Runner V2.

    Raises:
        UserError: if the user gave keys that only dynamic trees have.

    """
    for key, value in request.dynamic_values.items():
        raise UserError(
            f"{key}={shown(value)} is for dynamic trees, but tree='auto' is 'static' on Model "
            f"Runner V2; leave {key} out, or use tree='dynamic'"
        )
    logger.info("Medusa: tree='auto' is 'static' on Model Runner V2")
    return dataclasses.replace(request, tree=STATIC)


def _create(original: Any, args: Any, config: MedusaConfig, *rest: Any, **kwargs: Any) -> Any:
    """Let vLLM make its configuration."""
    with ExitStack() as stack:
        # Restored afterwards: vLLM can make several configurations from the same arguments.
        for name, value in _vllm_arguments(args, config).items():
            stack.enter_context(replaced(args, name, value))
        return original(args, *rest, **kwargs)


def _vllm_arguments(args: Any, config: MedusaConfig) -> dict[str, Any]:
    """Return the values of ``EngineArgs`` for vLLM."""
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": PROPOSER_CLASS,
            "num_speculative_tokens": config.limits.max_nodes,
        },
        # If the user asked for it, vLLM would end with a list of the methods that it allows: see
        # `check_asynchronous`.
        "async_scheduling": None if args.async_scheduling else args.async_scheduling,
        "spec_method": None,
        "spec_model": None,
        "spec_tokens": None,
        "additional_config": {**(args.additional_config or {}), CONFIG_KEY: config.to_dict()},
        "worker_cls": WORKER_CLASS,
    }


def _check_fit(vllm_config: Any, config: MedusaConfig, heads: HeadsReader) -> None:
    """Refuse heads of another model, after vLLM has read the model's configuration."""
    model_config = vllm_config.model_config
    vocab_size = model_config.get_vocab_size()
    heads.check_target(model_config.get_hidden_size(), vocab_size)
    config.tree.check_vocab(heads.spec.draft_vocab_size or vocab_size)
