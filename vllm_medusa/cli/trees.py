"""`vllm-medusa trees`: a picture of the trees that a few steps draft for a prompt."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from vllm_medusa.cli.arguments import add_settings, given_settings
from vllm_medusa.errors import UserError
from vllm_medusa.reporting.plots import PICTURE_KINDS, check_matplotlib
from vllm_medusa.settings import PathText, refuse_own_options, settings

if TYPE_CHECKING:
    from vllm_medusa.reporting.tree_pictures import VerifiedTree

#: No step emits more tokens: trees are not deeper.
_TOKENS_PER_STEP = 32
#: As the tools that compare engines: by default vLLM takes most of the memory.
_CPU_KV_CACHE_BYTES = 2**30
_MOST_TREES = 50
#: Arguments of ``vllm.LLM`` that the caller may not set, and what sets them.
_OWN_OPTIONS = {
    "model": "--model",
    "dtype": "--dtype",
    "speculative_config": "--heads and --speculative-options",
    "tensor_parallel_size": "this command, which watches one process",
    "pipeline_parallel_size": "this command, which watches one process",
}


@settings
class TreesSettings:
    """Which trees to draw."""

    model: str
    """The target model: directory or hub name."""
    heads: str | None = None
    """The Medusa heads (those in the model's own directory)."""
    prompt: str
    """The text to continue."""
    steps: Annotated[PositiveInt, Field(le=_MOST_TREES)] = 4
    """Number of steps to draw the trees of."""
    skip: NonNegativeInt = 0
    """Leave out the first N trees."""
    temperature: Annotated[float, Field(ge=0, strict=False)] = 0.0
    """Temperature of sampling; 0 is greedy."""
    seed: int = 0
    """Seed of sampling."""
    out: PathText = Path("trees.png")
    """File of the picture, .png or .svg."""
    speculative_options: Mapping[str, Any] = field(default_factory=dict)
    """More keys of the plugin's speculative_config, such as {"max_nodes": 8}."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the model."""
    llm_options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of vllm.LLM."""

    def __post_init__(self) -> None:
        if self.out.suffix not in PICTURE_KINDS:
            kinds = " or ".join(PICTURE_KINDS)
            raise UserError(f"--out {self.out}: its name must end in {kinds}; choose another")
        if self.out.is_dir() or not self.out.absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: no file can be written there; choose another")
        refuse_own_options(self.llm_options, _OWN_OPTIONS)
        check_matplotlib("bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    names = ("model", "heads", "prompt", "steps", "skip", "temperature", "seed", "out")
    add_settings(parser, TreesSettings, *names)
    add_settings(parser, TreesSettings, "speculative_options", "dtype", "llm_options")


def run(arguments: argparse.Namespace) -> str:
    """Run the prompt, draw the trees, and say what was accepted of them.

    Raises:
        UserError: settings, heads or a model that cannot be used, or no step had drafts.
    """
    from transformers import AutoTokenizer

    from vllm_medusa.reporting.tree_pictures import draw_trees

    given = TreesSettings(**given_settings(TreesSettings, arguments))
    trees = verified_trees(given)[given.skip : given.skip + given.steps]
    if not trees:
        raise UserError(
            f"no step of this text drafted a tree beyond the first {given.skip}; lower --skip, "
            "take a longer --prompt, or draft whatever it costs with "
            "--speculative-options '{\"measure_costs\": false}'"
        )
    tokenizer = given.llm_options.get("tokenizer") or given.model
    draw_trees(trees, AutoTokenizer.from_pretrained(tokenizer).decode, given.out)
    lines = [
        f"step {tree.step}: {len(tree.accepted)} of {len(tree.tokens)} draft tokens accepted"
        for tree in trees
    ]
    return "\n".join([*lines, f"wrote {given.out}"])


def verified_trees(given: TreesSettings) -> list[VerifiedTree]:
    """Run the prompt; return the trees of all its steps that had drafts."""
    from vllm_medusa.engines.engine import start_engine
    from vllm_medusa.engines.process import EngineProcessError
    from vllm_medusa.reporting.tree_pictures import VerifiedTree

    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
        # Trees are watched on Model Runner V1.
        environment = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
        with start_engine(_engine_options(given), environment, Path(log.name)) as engine:
            try:
                engine.run(
                    [given.prompt],
                    _TOKENS_PER_STEP * (given.skip + given.steps),
                    temperature=given.temperature,
                    seed=given.seed,
                )
            except EngineProcessError as error:
                raise UserError(
                    f"the engine of vLLM ended ({error.reason}); shorten --prompt or correct "
                    "--llm-options"
                ) from None
        return VerifiedTree.of_events([json.loads(line) for line in log])


def _engine_options(given: TreesSettings) -> dict[str, Any]:
    from vllm_medusa.engines.engine import has_accelerator

    heads = {} if given.heads is None else {"model": given.heads}
    options: dict[str, Any] = {
        "model": given.model,
        "dtype": given.dtype,
        "max_num_seqs": 1,
        # Compiling would take longer than the few steps.
        "enforce_eager": True,
        "speculative_config": {"method": "medusa", **heads, **given.speculative_options},
    }
    if not has_accelerator():
        options["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return {**options, **given.llm_options}
