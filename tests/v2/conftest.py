"""The engine on Model Runner V2, in the environment of tools/setup_v2.py (or on a GPU)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.checkpoints import Shapes, make_recurrent, prefix_shapes, selector_shapes
from tests.integration.conftest import greedy, open_engine, random_prompts
from vllm_medusa.heads import HeadsCheckpoint, HeadsSpec, load_heads
from vllm_medusa.heads.io.write import save_heads

# Without V2 there is nothing to collect: `make test-v2` has it.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if find_spec("triton") is None or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1":
    collect_ignore_glob = ["test_*"]
elif IS_INTERPRETED:
    from tests.v2 import interpreter

    interpreter.install()

NUM_PROMPTS = 6
MAX_TOKENS = 24


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("v2")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_heads(tmp_path_factory.mktemp("tiny-heads"))


@pytest.fixture(scope="session")
def seeing_heads(tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny heads, but root-aware and with a selector of rank 4."""
    heads, rank = load_heads(tiny_heads, target_vocab_size=tiny.VOCAB_SIZE), 4
    num_heads, size = heads.spec.num_heads, heads.spec.hidden_size
    shapes = {"root.weight": (num_heads, size, size)}
    shapes |= selector_shapes(num_heads, tiny.VOCAB_SIZE, rank)
    spec = dataclasses.replace(heads.spec, root_size=size, selector_rank=rank)
    return write_with(heads, spec, shapes, tmp_path_factory.mktemp("seeing") / "heads")


@pytest.fixture(scope="session")
def prefix_heads(tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny heads with prefix attention over 5 positions."""
    heads = load_heads(tiny_heads, target_vocab_size=tiny.VOCAB_SIZE)
    size = heads.spec.hidden_size
    spec = dataclasses.replace(heads.spec, root_size=size, prefix_window=5)
    shapes = prefix_shapes(size, size, 5)
    return write_with(heads, spec, shapes, tmp_path_factory.mktemp("prefix") / "heads")


@pytest.fixture(scope="session")
def recurrent_heads(tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recurrent heads with prefix attention over 5 positions, as deep as the tiny ones."""
    spec = load_heads(tiny_heads, target_vocab_size=tiny.VOCAB_SIZE).spec
    heads = make_recurrent(
        num_heads=spec.num_heads,
        hidden_size=spec.hidden_size,
        vocab_size=tiny.VOCAB_SIZE,
        embedding_size=spec.hidden_size,
        window=5,
    )
    path = tmp_path_factory.mktemp("recurrent") / "heads"
    save_heads(heads, path)
    return path


def write_with(heads: HeadsCheckpoint, spec: HeadsSpec, shapes: Shapes, path: Path) -> Path:
    """Write heads with additional random tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_heads(dataclasses.replace(heads, spec=spec, tensors=heads.tensors | tensors), path)
    return path


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Callable[..., Any]:
    """``with engine(**LLM options) as llm``, on the tiny model."""
    return lambda **options: open_engine(
        tiny_model, **{"max_model_len": 256, "max_num_seqs": 8, **options}
    )


@pytest.fixture(scope="session")
def prompts() -> list[dict[str, list[int]]]:
    return random_prompts(NUM_PROMPTS)


@pytest.fixture(scope="session")
def reference(engine: Callable[..., Any], prompts: list[Any]) -> list[list[int]]:
    """Greedy text of V2 without speculation."""
    with engine() as llm:
        return greedy(llm, prompts, MAX_TOKENS)


@pytest.fixture(scope="module")
def fast_attention() -> Iterator[None]:
    """Attention by torch in place of the kernel, whose tests are elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        if IS_INTERPRETED:
            from vllm_medusa.plugin.worker.v2 import attention

            patch.setattr(attention, "tree_attention", interpreter.attend_with_torch())
        yield
