"""All methods of vLLM that our classes and objects override, checked like patched functions.

A subclass depends on the names and parameters of its base as much as a patch, but Python does not
notice if the base changes. So the overridden methods are listed here with the parameters that our
code relies on. They are checked when the worker class is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_medusa.plugin.compat import check_signature
from vllm_medusa.plugin.patches import resolved

#: ``worker``: with both model runners.
Where = Literal["worker", "V1", "V2"]


@dataclass(frozen=True)
class Override:
    """One overridden method.

    Attributes:
        where: the model runner, or `worker` for both.
        owner: ``module:Class``, or ``module:`` for a name in that module.
        name: name of the method.
        parameters: required names of its first parameters.
        by: the class that overrides it, in ``vllm_medusa.plugin.worker``.
        why: what the override adds.

    """

    where: Where
    owner: str
    name: str
    parameters: tuple[str, ...]
    by: str
    why: str


def check(where: Where) -> None:
    """Check the methods that are overridden.

    Raises:
        UserError: if one is not there, or its parameters are not those that are expected.

    """
    for override in OVERRIDES:
        if override.where == where:
            check_signature(resolved(override.owner), override.name, override.parameters)


_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V1_SAMPLER = "vllm.v1.sample.rejection_sampler:RejectionSampler"
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_V2_SAMPLER = "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler"
_V2_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator"
_V2_BUILDER = "vllm.v1.attention.backend:AttentionMetadataBuilder"
_V2_IMPL = "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl"

_WORKER_MIXIN = "worker._WorkerMixin"
_RUNNER = "v1.runner.MedusaRunnerMixin"
_V2_RUNNER = "v2.runner.TreeRunnerMixin"
_IMPL_MIXIN = "v2.attention.TreeImplMixin"
_BUILDER_MIXIN = "v2.attention.TreeBuilderMixin"
_SPECULATOR = "v2.speculator.TreeSpeculator"
_TREE_SAMPLER = "v2.sampler.TreeSampler"

OVERRIDES = (
    Override("worker", _WORKER, "init_device", ("self",), _WORKER_MIXIN, "errors in one line"),
    Override("worker", _WORKER, "load_model", ("self",), _WORKER_MIXIN, "errors in one line"),
    Override(
        "worker",
        _WORKER,
        "initialize_from_config",
        ("self", "kv_cache_config"),
        _WORKER_MIXIN,
        "errors in one line",
    ),
    Override(
        "worker",
        _WORKER,
        "compile_or_warm_up_model",
        ("self",),
        _WORKER_MIXIN,
        "dynamic trees measure step costs",
    ),
    Override(
        "worker",
        _WORKER,
        "_make_model_runner",
        ("self",),
        "worker.MedusaWorker",
        "our model runner",
    ),
    Override(
        "worker",
        "vllm.v1.worker.cpu_worker:",
        "CPUModelRunner",
        ("vllm_config", "device"),
        "worker.MedusaWorker",
        "our model runner, while `CPUWorker.init_device` runs",
    ),
    Override(
        "V1",
        _V1,
        "initialize_kv_cache",
        ("self", "kv_cache_config", "is_profiling"),
        _RUNNER,
        "path forks are set up",
    ),
    Override(
        "V1", _V1, "_update_states", ("self", "scheduler_output"), _RUNNER, "fork blocks are freed"
    ),
    Override(
        "V1",
        _V1,
        "_prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
        _RUNNER,
        "positions of nodes, block tables of forks",
    ),
    Override(
        "V1",
        _V1,
        "_dummy_sampler_run",
        ("self", "hidden_states"),
        _RUNNER,
        "a draft for each dummy request",
    ),
    Override("V1", _V1, "_dummy_run", ("self",), _RUNNER, "no forks in a dummy step"),
    Override(
        "V1",
        _V1,
        "sample_tokens",
        ("self", "grammar_output"),
        _RUNNER,
        "counters are sent with the output",
    ),
    Override(
        "V1",
        _V1,
        "_sample",
        ("self", "logits", "spec_decode_metadata"),
        _RUNNER,
        "the accepted path is committed",
    ),
    Override(
        "V1",
        _V1,
        "_bookkeeping_sync",
        ("self",),
        _RUNNER,
        "generators are not rewound after prompt chunks",
    ),
    Override(
        "V1",
        _V1,
        "_input_fits_in_drafter",
        ("self", "common_attn_metadata"),
        _RUNNER,
        "heads have no context of their own",
    ),
    Override(
        "V1",
        _V1,
        "propose_draft_token_ids",
        (
            "self",
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
        ),
        _RUNNER,
        "trees are drafted",
    ),
    Override(
        "V1", _V1, "take_draft_token_ids", ("self",), _RUNNER, "parents are sent with the drafts"
    ),
    Override(
        "V1",
        _V1_SAMPLER,
        "forward",
        ("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
        "v1.sampler.TreeSampler",
        "a sample at every node, lossless acceptance",
    ),
    Override(
        "V1",
        "vllm.v1.worker.utils:AttentionGroup",
        "build_metadata",
        ("self", "common_attn_metadata"),
        "v1.path_forks.PathForks",
        "forks as sequences of their own; on the object",
    ),
    Override(
        "V2",
        "vllm.v1.worker.gpu.model_runner:",
        "init_speculator",
        ("vllm_config", "device"),
        _V2_RUNNER,
        "our speculator, while the runner is made",
    ),
    Override("V2", _V2, "load_model", ("self",), _V2_RUNNER, "heads, sampler, attention backends"),
    Override(
        "V2",
        _V2,
        "initialize_kv_cache",
        ("self", "kv_cache_config"),
        _V2_RUNNER,
        "caches whose accepted K/V is moved",
    ),
    Override("V2", _V2, "add_requests", ("self", "scheduler_output"), _V2_RUNNER, "chains noted"),
    Override("V2", _V2, "prepare_attn", ("self", "input_batch"), _V2_RUNNER, "positions and masks"),
    Override("V2", _V2, "prepare_dummy_attn", ("self",), _V2_RUNNER, "no trees"),
    Override("V2", _V2, "capture_model", ("self",), _V2_RUNNER, "no trees"),
    Override(
        "V2",
        _V2,
        "sample",
        ("self", "hidden_states", "input_batch", "grammar_output"),
        _V2_RUNNER,
        "accepted K/V is moved",
    ),
    Override(
        "V2", _V2, "take_draft_token_ids", ("self",), _V2_RUNNER, "parents are sent with the drafts"
    ),
    Override(
        "V2",
        _V2_SPECULATOR,
        "init_cudagraph_manager",
        ("self", "cudagraph_mode"),
        _SPECULATOR,
        "the heads' graphs, where decode steps have full ones",
    ),
    Override("V2", _V2_SPECULATOR, "capture", ("self",), _SPECULATOR, "the heads are captured"),
    Override(
        "V2",
        _V2_SPECULATOR,
        "propose",
        (
            "self",
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
        ),
        _SPECULATOR,
        "trees are drafted",
    ),
    Override(
        "V2",
        _V2_SAMPLER,
        "__call__",
        ("self", "logits", "input_batch", "draft_logits", "invalid_drafts"),
        _TREE_SAMPLER,
        "a sample at every node",
    ),
    Override(
        "V2",
        _V2_SAMPLER,
        "_verify",
        ("self", "logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping"),
        _TREE_SAMPLER,
        "lossless acceptance",
    ),
    Override(
        "V2",
        _V2_SAMPLER,
        "_get_logprobs_tensors",
        ("self", "sampled", "num_sampled", "logits", "cu_num_logits"),
        _TREE_SAMPLER,
        "logprobs at the accepted nodes",
    ),
    Override(
        "V2",
        _V2_BUILDER,
        "build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        _BUILDER_MIXIN,
        "requests with trees apart from those without",
    ),
    Override(
        "V2",
        _V2_BUILDER,
        "build_for_cudagraph_capture",
        ("self", "common_attn_metadata"),
        _BUILDER_MIXIN,
        "the same",
    ),
    Override(
        "V2",
        _V2_IMPL,
        "forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        _IMPL_MIXIN,
        "attention to trees",
    ),
    Override(
        "V2",
        _V2_IMPL,
        "fused_output_quant_supported",
        ("self", "quant_key"),
        _IMPL_MIXIN,
        "outputs are not quantised in the kernel",
    ),
)
