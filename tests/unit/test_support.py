"""Attention backends that trees are refused with; the rest is in test_bad_input.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_medusa.errors import UserError
from vllm_medusa.plugin.support import check_attention


def group(writes_itself: bool = False, kernel_block_size: int | None = None) -> Any:
    backend = SimpleNamespace(
        get_name=lambda: "SOME_ATTN", forward_includes_kv_cache_update=writes_itself
    )
    return SimpleNamespace(
        backend=backend,
        kernel_block_size=kernel_block_size,
        kv_cache_spec=SimpleNamespace(block_size=64),
    )


def test_an_ordinary_backend_passes() -> None:
    check_attention([[group()], [group(), group()]], [64, 64])


@pytest.mark.parametrize(
    ("refused", "kernel_sizes", "message"),
    [
        (group(writes_itself=True), [64, 64], "attention_backend='SOME_ATTN' is not supported"),
        (group(kernel_block_size=16), [64, 64], "block_size=64 .* kernel blocks of 16"),
        (group(), [64, 32], "block_size=64 .* kernel blocks of 32"),
    ],
)
def test_backends_that_are_refused(refused: Any, kernel_sizes: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_attention([[group()], [refused]], kernel_sizes)
