"""All methods of vLLM that our classes and objects override, checked like patched functions.

A subclass depends on the names and parameters of its base as much as a patch, but Python does not
notice if the base changes. So the overridden methods are listed here with the parameters that our
code relies on. They are checked when the worker class is built.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def _overrides(where: Where, owner: str, by: str, methods: Mapping[str, str]) -> list[Override]:
    """Return the overrides of a class of vLLM by one of ours.

    Args:
        where: as `Override` has it.
        owner: likewise.
        by: likewise.
        methods: by signature, ``name(first, parameters)``: what the override adds.

    """
    found = []
    for signature, why in methods.items():
        name, _, parameters = signature.removesuffix(")").partition("(")
        found.append(Override(where, owner, name, tuple(parameters.split(", ")), by, why))
    return found


OVERRIDES = (
    *_overrides(
        "worker",
        "vllm.v1.worker.gpu_worker:Worker",
        "worker._WorkerMixin",
        {
            "init_device(self)": "errors in one line",
            "load_model(self)": "errors in one line",
            "initialize_from_config(self, kv_cache_config)": "errors in one line",
            "compile_or_warm_up_model(self)": "dynamic trees measure step costs",
        },
    ),
    *_overrides(
        "worker",
        "vllm.v1.worker.gpu_worker:Worker",
        "worker.MedusaWorker",
        {"_make_model_runner(self)": "our model runner"},
    ),
    *_overrides(
        "worker",
        "vllm.v1.worker.cpu_worker:",
        "worker.MedusaWorker",
        {
            "CPUModelRunner(vllm_config, device)": (
                "our model runner, while `CPUWorker.init_device` runs"
            ),
        },
    ),
    *_overrides(
        "V1",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "v1.runner.MedusaRunnerMixin",
        {
            "initialize_kv_cache(self, kv_cache_config, is_profiling)": "path forks are set up",
            "_update_states(self, scheduler_output)": "fork blocks are freed",
            "_prepare_inputs(self, scheduler_output, num_scheduled_tokens)": (
                "positions of nodes, block tables of forks"
            ),
            "_dummy_sampler_run(self, hidden_states)": "a draft for each dummy request",
            "_dummy_run(self)": "no forks in a dummy step",
            "sample_tokens(self, grammar_output)": "counters are sent with the output",
            "_sample(self, logits, spec_decode_metadata)": "the accepted path is committed",
            "_bookkeeping_sync(self)": "generators are not rewound after prompt chunks",
            "_input_fits_in_drafter(self, common_attn_metadata)": (
                "heads have no context of their own"
            ),
            "propose_draft_token_ids(self, scheduler_output, sampled_token_ids, sampling_metadata, "
            "hidden_states, sample_hidden_states, aux_hidden_states, spec_decode_metadata)": (
                "trees are drafted"
            ),
            "take_draft_token_ids(self)": "parents are sent with the drafts",
        },
    ),
    *_overrides(
        "V1",
        "vllm.v1.sample.rejection_sampler:RejectionSampler",
        "v1.sampler.TreeSampler",
        {
            "forward(self, metadata, draft_probs, logits, sampling_metadata)": (
                "a sample at every node, lossless acceptance"
            ),
        },
    ),
    *_overrides(
        "V1",
        "vllm.v1.worker.utils:AttentionGroup",
        "v1.path_forks.PathForks",
        {
            "build_metadata(self, common_attn_metadata)": (
                "forks as sequences of their own; on the object"
            ),
        },
    ),
    *_overrides(
        "V2",
        "vllm.v1.worker.gpu.model_runner:",
        "v2.runner.TreeRunnerMixin",
        {"init_speculator(vllm_config, device)": "our speculator, while the runner is made"},
    ),
    *_overrides(
        "V2",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "v2.runner.TreeRunnerMixin",
        {
            "load_model(self)": "heads, sampler, attention backends",
            "initialize_kv_cache(self, kv_cache_config)": "caches whose accepted K/V is moved",
            "add_requests(self, scheduler_output)": "chains noted",
            "prepare_attn(self, input_batch)": "positions and masks",
            "prepare_dummy_attn(self)": "no trees",
            "capture_model(self)": "no trees",
            "sample(self, hidden_states, input_batch, grammar_output)": "accepted K/V is moved",
            "take_draft_token_ids(self)": "parents are sent with the drafts",
        },
    ),
    *_overrides(
        "V2",
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator",
        "v2.speculator.TreeSpeculator",
        {
            "init_cudagraph_manager(self, cudagraph_mode)": (
                "the heads' graphs, where decode steps have full ones"
            ),
            "capture(self)": "the heads are captured",
            "propose(self, input_batch, attn_metadata, slot_mappings, last_hidden_states, "
            "aux_hidden_states, num_sampled, num_rejected, last_sampled, next_prefill_tokens)": (
                "trees are drafted"
            ),
        },
    ),
    *_overrides(
        "V2",
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler",
        "v2.sampler.TreeSampler",
        {
            "__call__(self, logits, input_batch, draft_logits, invalid_drafts)": (
                "a sample at every node"
            ),
            "_verify(self, logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping)": (
                "lossless acceptance"
            ),
            "_get_logprobs_tensors(self, sampled, num_sampled, logits, cu_num_logits)": (
                "logprobs at the accepted nodes"
            ),
        },
    ),
    *_overrides(
        "V2",
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
        "v2.attention.TreeBuilderMixin",
        {
            "build(self, common_prefix_len, common_attn_metadata, fast_build)": (
                "requests with trees apart from those without"
            ),
            "build_for_cudagraph_capture(self, common_attn_metadata)": "the same",
        },
    ),
    *_overrides(
        "V2",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl",
        "v2.attention.TreeImplMixin",
        {
            "forward(self, layer, query, key, value, kv_cache, attn_metadata, output)": (
                "attention to trees"
            ),
            "fused_output_quant_supported(self, quant_key)": (
                "outputs are not quantised in the kernel"
            ),
        },
    ),
)
