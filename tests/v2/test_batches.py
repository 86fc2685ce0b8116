"""A batch is cut in two: requests with drafts, and the others, whose metadata vLLM builds."""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_medusa.plugin.worker.v2.attention import _part


def test_rest_of_a_batch_is_a_batch() -> None:
    starts = torch.tensor([0, 17, 22, 23, 40], dtype=torch.int32)
    rest = _part(
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([50, 60, 70, 80]),
            num_reqs=4,
            num_actual_tokens=40,
            max_query_len=17,
            max_seq_len=80,
            block_table_tensor=torch.arange(8).view(4, 2),
            slot_mapping=torch.arange(40),
            seq_lens_cpu_upper_bound=torch.tensor([50, 60, 70, 80]),
            is_prefilling=torch.tensor([False, False, False, True]),
        ),
        2,
        4,
    )
    assert rest.query_start_loc.tolist() == [0, 1, 18]
    assert rest.query_start_loc_cpu.tolist() == [0, 1, 18]
    assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len) == (2, 18, 17)
    assert rest.seq_lens.tolist() == [70, 80]
    assert rest.seq_lens_cpu_upper_bound.tolist() == [70, 80]
    assert rest.block_table_tensor.tolist() == [[4, 5], [6, 7]]
    assert rest.slot_mapping.tolist() == list(range(22, 40))
    assert rest.is_prefilling.tolist() == [False, True]
