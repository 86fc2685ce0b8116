"""Configurations that are refused at start-up, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from vllm_medusa.config import MedusaConfig
from vllm_medusa.errors import UserError, shown
from vllm_medusa.kernels import MAX_NODES
from vllm_medusa.plugin.compat import plugin_logger

logger = plugin_logger(__name__)

#: A setting, its value, and why it is refused.
Refusal = tuple[str, Any, str]


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
    for setting, value, reason in chain(
        _refused_always(vllm_config),
        _refused_on_v2(vllm_config, config) if is_v2 else (),
        () if config.limits.max_paths == 1 else refused_with_trees(vllm_config),
    ):
        raise UserError(f"{setting}={shown(value)} is not supported with Medusa: {reason}")
    _check_token_budget(vllm_config, config)
    if not is_v2:
        _avoid_full_cuda_graphs(vllm_config)


def _refused_always(vllm_config: Any) -> Iterator[Refusal]:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    architectures = getattr(model.hf_config, "architectures", None)
    if (size := parallel.pipeline_parallel_size) > 1:
        reason = "only the last stage knows what was accepted; use tensor parallelism"
        yield "pipeline_parallel_size", size, reason
    if (size := parallel.decode_context_parallel_size) > 1:
        reason = "a block's tokens lie on several ranks; use tensor parallelism"
        yield "decode_context_parallel_size", size, reason
    if model.is_encoder_decoder:
        reason = "the plugin cannot draft for encoder-decoder models"
        yield "model", architectures, f"{reason}; serve without speculative_config"
    if model.is_hybrid or model.is_attention_free:
        reason = "recurrent (Mamba-like) states cannot be forked; serve without speculative_config"
        yield "model", architectures, reason
    if model.runner_type != "generate":
        reason = "only models that generate text use drafts; leave speculative_config out"
        yield "runner", model.runner_type, reason
    if (backend := vllm_config.structured_outputs_config.backend) == "lm-format-enforcer":
        reason = (
            "vLLM compiles no grammar with it when tokens are speculated; use 'auto', 'xgrammar', "
            "'guidance' or 'outlines'"
        )
        yield "structured_outputs_config.backend", backend, reason


def _refused_on_v2(vllm_config: Any, config: MedusaConfig) -> Iterator[Refusal]:
    parallel = vllm_config.parallel_config
    if config.dynamic is not None and "heads" not in config.dynamic.sources:
        reason = (
            "the text is searched on the host, and Model Runner V2 does not wait for the host; add "
            "'heads', or use V1 with VLLM_USE_V2_MODEL_RUNNER=0"
        )
        yield "sources", list(config.dynamic.sources), reason
    if (num_nodes := config.limits.max_nodes) >= MAX_NODES:
        reason = "Model Runner V2 keeps a node's ancestors in 64 bits"
        yield "tree", f"{num_nodes} nodes", f"{reason}; use {MAX_NODES - 1} nodes or fewer"
    if (size := getattr(parallel, "prefill_context_parallel_size", 1)) > 1:
        reason = "a request's tokens lie on several ranks; use tensor parallelism"
        yield "prefill_context_parallel_size", size, reason
    if getattr(vllm_config, "watermark_config", None) is not None:
        reason = "a watermark needs drafts that are a chain; leave it out"
        yield "watermark_config", "given", reason
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        reason = "a rank would not know the paths that other ranks accept; leave it out"
        yield "enable_batch_sharded_sampling", True, reason
    if getattr(vllm_config.model_config, "return_sampling_mask", False):
        reason = "masks for tree nodes are not returned yet; leave it out"
        yield "return_sampling_mask", True, reason


def _refused_with_masks(vllm_config: Any) -> Iterator[Refusal]:
    """Yield what attention to trees does not support on V2."""
    kv_role = getattr(vllm_config.kv_transfer_config, "kv_role", None)
    for refusal in _refused_with_forks(vllm_config):
        if not (refusal[0] == "kv_transfer_config.kv_connector" and kv_role == "kv_producer"):
            yield refusal
    model = vllm_config.model_config
    if getattr(model.hf_text_config, "attention_chunk_size", None) is not None:
        reason = "its attention is cut into chunks by a token's slot, not by its position"
        yield (
            "model",
            getattr(model.hf_config, "architectures", None),
            f"{reason}; use tree='chain'",
        )


def _refused_with_forks(vllm_config: Any) -> Iterator[Refusal]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    architectures = getattr(model.hf_config, "architectures", None)
    # vLLM turns it into a connector, whose name the user does not know.
    if cache.kv_offloading_size is not None:
        reason = "it saves blocks before the accepted tokens are in them"
        remedy = "leave it out or use tree='chain'"
        yield "kv_offloading_size", cache.kv_offloading_size, f"{reason}; {remedy}"
    if model.use_mla:
        reason = "attention to trees does not support MLA caches yet; use tree='chain'"
        yield "model", architectures, reason
    if model.uses_mrope:
        reason = "M-RoPE positions of trees are not supported yet; use tree='chain'"
        yield "model", architectures, reason
    if model.is_mm_prefix_lm or model.rswa_window is not None:
        reason = "its attention depends on a request's prompt, not on its path; use tree='chain'"
        yield "model", architectures, reason
    if (transfer := vllm_config.kv_transfer_config) is not None:
        reason = "a connector saves blocks before the accepted tokens are in them"
        connector = getattr(transfer, "kv_connector", None)
        yield "kv_transfer_config.kv_connector", connector, f"{reason}; use tree='chain'"
    if vllm_config.parallel_config.use_ubatching:
        reason = "micro-batches would split a tree; leave it out or use tree='chain'"
        yield "enable_dbo", True, reason
    if cache.kv_sharing_fast_prefill:
        reason = "it selects tokens by request, not by path; leave it out or use tree='chain'"
        yield "kv_sharing_fast_prefill", True, reason


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
