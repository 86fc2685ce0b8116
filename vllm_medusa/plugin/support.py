"""Configurations that are refused at start-up, each with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_medusa.config import MedusaConfig
from vllm_medusa.errors import UserError, shown
from vllm_medusa.kernels import MAX_NODES
from vllm_medusa.plugin.compat import plugin_logger

logger = plugin_logger(__name__)


def check_before(args: Any, worker_class: str) -> None:
    """Check ``EngineArgs`` before vLLM builds its configuration from them."""
    if args.worker_cls not in ("auto", worker_class):
        raise UserError(
            f"worker_cls={shown(args.worker_cls)} cannot be combined with method 'medusa', which "
            "brings its own worker class; leave worker_cls out"
        )
    # Checked here, because vLLM would first require a token budget for LoRA with drafts.
    if args.enable_lora:
        raise UserError(
            "enable_lora=True is not supported with Medusa: the heads were trained for the base "
            "model; serve the merged model instead"
        )


def check_asynchronous(args: Any, vllm_config: Any) -> None:
    """Refuse asynchronous scheduling where the user asked for it and did not get it.

    Args:
        args: ``EngineArgs``, as the user gave them.
        vllm_config: vLLM's configuration, made without the user's ``async_scheduling``. With it,
            vLLM would end with a list of the speculative methods that it allows.

    Raises:
        UserError: naming the setting, its value and the remedy.

    """
    if args.async_scheduling and not vllm_config.scheduler_config.async_scheduling:
        raise UserError(
            f"async_scheduling={args.async_scheduling} is not supported with Medusa here: the next "
            "step's drafts are known only when this step is over; leave it out"
        )


def check_supported(vllm_config: Any, config: MedusaConfig) -> None:
    """Refuse a configuration in which trees cannot be verified.

    Raises:
        UserError: naming the setting, its value and the remedy.

    """
    is_v2 = bool(vllm_config.use_v2_model_runner)
    refused_with_trees = _refused_with_masks if is_v2 else _refused_with_forks
    for setting, value, is_refused, reason in [
        *_refused_always(vllm_config),
        *(_refused_on_v2(vllm_config, config) if is_v2 else []),
        *([] if config.limits.max_paths == 1 else refused_with_trees(vllm_config)),
    ]:
        if is_refused:
            raise UserError(f"{setting}={shown(value)} is not supported with Medusa: {reason}")
    _check_token_budget(vllm_config, config)
    if not is_v2:
        _avoid_full_cuda_graphs(vllm_config)


def _refused_always(vllm_config: Any) -> list[tuple[str, Any, bool, str]]:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    pipeline = parallel.pipeline_parallel_size
    architectures = getattr(model.hf_config, "architectures", None)
    return [
        (
            "pipeline_parallel_size",
            pipeline,
            pipeline > 1,
            "only the last stage knows what was accepted; use tensor parallelism",
        ),
        (
            "decode_context_parallel_size",
            parallel.decode_context_parallel_size,
            parallel.decode_context_parallel_size > 1,
            "a block's tokens lie on several ranks; use tensor parallelism",
        ),
        (
            "model",
            architectures,
            model.is_encoder_decoder,
            "the plugin cannot draft for encoder-decoder models; serve without speculative_config",
        ),
        (
            "model",
            architectures,
            model.is_hybrid or model.is_attention_free,
            "recurrent (Mamba-like) states cannot be forked; serve without speculative_config",
        ),
        (
            "runner",
            model.runner_type,
            model.runner_type != "generate",
            "only models that generate text use drafts; leave speculative_config out",
        ),
        (
            "structured_outputs_config.backend",
            vllm_config.structured_outputs_config.backend,
            vllm_config.structured_outputs_config.backend == "lm-format-enforcer",
            "vLLM compiles no grammar with it when tokens are speculated; use 'auto', 'xgrammar', "
            "'guidance' or 'outlines'",
        ),
    ]


def _refused_on_v2(vllm_config: Any, config: MedusaConfig) -> list[tuple[str, Any, bool, str]]:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    num_nodes = config.limits.max_nodes
    sources = None if config.dynamic is None else list(config.dynamic.sources)
    prefill_context = getattr(parallel, "prefill_context_parallel_size", 1)
    return [
        (
            "sources",
            sources,
            sources is not None and "heads" not in sources,
            "the text is searched on the host, and Model Runner V2 does not wait for the host; add "
            "'heads', or use V1 with VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        (
            "tree",
            f"{num_nodes} nodes",
            num_nodes >= MAX_NODES,
            f"Model Runner V2 keeps a node's ancestors in 64 bits; use {MAX_NODES - 1} nodes or "
            "fewer",
        ),
        (
            "prefill_context_parallel_size",
            prefill_context,
            prefill_context > 1,
            "a request's tokens lie on several ranks; use tensor parallelism",
        ),
        (
            "watermark_config",
            "given",
            getattr(vllm_config, "watermark_config", None) is not None,
            "a watermark needs drafts that are a chain; leave it out",
        ),
        (
            "enable_batch_sharded_sampling",
            True,
            bool(getattr(parallel, "enable_batch_sharded_sampling", False)),
            "a rank would not know the paths that other ranks accept; leave it out",
        ),
        (
            "return_sampling_mask",
            True,
            bool(getattr(model, "return_sampling_mask", False)),
            "masks for tree nodes are not returned yet; leave it out",
        ),
    ]


def _refused_with_masks(vllm_config: Any) -> list[tuple[str, Any, bool, str]]:
    """Return what attention to trees does not support on V2."""
    model = vllm_config.model_config
    chunk = getattr(model.hf_text_config, "attention_chunk_size", None)
    kv_role = getattr(vllm_config.kv_transfer_config, "kv_role", None)
    shared = [
        refusal
        for refusal in _refused_with_forks(vllm_config)
        if not (refusal[0] == "kv_transfer_config.kv_connector" and kv_role == "kv_producer")
    ]
    return [
        *shared,
        (
            "model",
            getattr(model.hf_config, "architectures", None),
            chunk is not None,
            "its attention is cut into chunks by a token's slot, not by its position; use "
            "tree='chain'",
        ),
    ]


def _refused_with_forks(vllm_config: Any) -> list[tuple[str, Any, bool, str]]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    architectures = getattr(model.hf_config, "architectures", None)
    offloading_size = vllm_config.cache_config.kv_offloading_size
    return [
        (
            "kv_offloading_size",
            offloading_size,
            # vLLM turns it into a connector, whose name the user does not know.
            offloading_size is not None,
            "it saves blocks before the accepted tokens are in them; leave it out or use "
            "tree='chain'",
        ),
        (
            "model",
            architectures,
            model.use_mla,
            "attention to trees does not support MLA caches yet; use tree='chain'",
        ),
        (
            "model",
            architectures,
            model.uses_mrope,
            "M-RoPE positions of trees are not supported yet; use tree='chain'",
        ),
        (
            "model",
            architectures,
            model.is_mm_prefix_lm or model.rswa_window is not None,
            "its attention depends on a request's prompt, not on its path; use tree='chain'",
        ),
        (
            "kv_transfer_config.kv_connector",
            getattr(vllm_config.kv_transfer_config, "kv_connector", None),
            vllm_config.kv_transfer_config is not None,
            "a connector saves blocks before the accepted tokens are in them; use tree='chain'",
        ),
        (
            "enable_dbo",
            True,
            bool(parallel.use_ubatching),
            "micro-batches would split a tree; leave it out or use tree='chain'",
        ),
        (
            "kv_sharing_fast_prefill",
            True,
            bool(vllm_config.cache_config.kv_sharing_fast_prefill),
            "it selects tokens by request, not by path; leave it out or use tree='chain'",
        ),
    ]


def check_attention(attn_groups: Sequence[Sequence[Any]], block_sizes: Sequence[int]) -> None:
    """Refuse attention backends that cannot write the K/V of forks.

    Args:
        attn_groups: vLLM's attention groups, by KV-cache group.
        block_sizes: tokens of a block as the kernels see it, for each KV-cache group.

    Raises:
        UserError: naming the backend or the block size, and the remedy.

    """
    for groups, block_size in zip(attn_groups, block_sizes, strict=True):
        for group in groups:
            name = group.backend.get_name()
            if group.backend.forward_includes_kv_cache_update:
                raise UserError(
                    f"attention_backend={name!r} is not supported with Medusa trees: it writes the "
                    "KV cache within its kernel; choose another backend or use tree='chain'"
                )
            if group.kernel_block_size is not None or group.kv_cache_spec.block_size != block_size:
                raise UserError(
                    f"block_size={group.kv_cache_spec.block_size} is not supported with Medusa "
                    f"trees: {name} splits it into kernel blocks of "
                    f"{group.kernel_block_size or block_size}; use that as block_size, or "
                    "tree='chain'"
                )


def _check_token_budget(vllm_config: Any, config: MedusaConfig) -> None:
    nodes = config.limits.max_nodes + 1
    for setting in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        budget = getattr(vllm_config.scheduler_config, setting)
        if budget is not None and nodes > budget:
            raise UserError(
                f"the tree {config.tree_name} verifies {nodes} tokens of a request in one step, "
                f"over {setting}={budget}; raise it or use a smaller tree"
            )


def _avoid_full_cuda_graphs(vllm_config: Any) -> None:
    """Use piecewise graphs: full graphs fix the number of sequences, which forks change."""
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode.has_full_cudagraphs():
        logger.info("Medusa: cudagraph_mode is PIECEWISE, because path forks change the batch.")
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
