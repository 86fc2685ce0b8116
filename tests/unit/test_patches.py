"""Every patched and overridden function of vLLM is listed, and fits the vLLM in use."""

from __future__ import annotations

import ast
import importlib.util
from itertools import chain
from pathlib import Path

import patch_table
import pytest

from vllm_medusa.plugin.overrides import OVERRIDES, Override
from vllm_medusa.plugin.patches import PATCHES, Patch
from vllm_medusa.plugin.versions import VERIFIED

REPO = Path(__file__).parents[2]
PLUGIN = REPO / "vllm_medusa" / "plugin"
VLLM = Path(importlib.util.find_spec("vllm").origin).parent  # type: ignore[union-attr, arg-type]

#: Our classes that stand in for vLLM's, and the classes of vLLM that they override methods of.
BASES = {
    "worker/worker.py:_WorkerMixin": ["v1/worker/gpu_worker.py:Worker"],
    "worker/v1/runner.py:MedusaRunnerMixin": ["v1/worker/gpu_model_runner.py:GPUModelRunner"],
    "worker/v1/sampler.py:TreeSampler": ["v1/sample/rejection_sampler.py:RejectionSampler"],
    "worker/v2/runner.py:TreeRunnerMixin": ["v1/worker/gpu/model_runner.py:GPUModelRunner"],
    "worker/v2/sampler.py:TreeSampler": [
        "v1/worker/gpu/spec_decode/rejection_sampler.py:RejectionSampler"
    ],
    "worker/v2/speculator.py:TreeSpeculator": [
        "v1/worker/gpu/spec_decode/speculator.py:BaseSpeculator"
    ],
    "worker/v2/attention.py:TreeBuilderMixin": ["v1/attention/backend.py:AttentionMetadataBuilder"],
    "worker/v2/attention.py:TreeImplMixin": [
        "v1/attention/backends/triton_attn.py:TritonAttentionImpl"
    ],
}


def parameters_of(path: Path, owner: str) -> dict[str, list[str]]:
    """Parameters of the methods of a class, or of a module's functions; read, not imported.

    V2's modules cannot be imported without Triton.
    """
    body = ast.parse(path.read_text()).body
    if owner:
        (body,) = [n.body for n in body if isinstance(n, ast.ClassDef) and n.name == owner]
    return {
        node.name: [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


def defined_in(owner: str) -> tuple[Path, str]:
    module, _, name = owner.partition(":")
    path = VLLM.joinpath(*module.split(".")[1:])
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")), name


@pytest.mark.parametrize("entry", OVERRIDES, ids=lambda e: f"{e.where} {e.name}")
def test_overridden_methods_have_their_parameters(entry: Override) -> None:
    path, name = defined_in(entry.owner)
    if not name:  # a name that the module imports: checked where it is used
        assert entry.name in path.read_text()
        return
    found = parameters_of(path, name)[entry.name]
    assert found[: len(entry.parameters)] == list(entry.parameters)


@pytest.mark.parametrize("ours", BASES)
def test_every_override_is_listed(ours: str) -> None:
    file, _, name = ours.partition(":")
    own = parameters_of(PLUGIN / file, name)
    module = file.removeprefix("worker/").removesuffix(".py").replace("/", ".")
    listed = {entry.name for entry in OVERRIDES if entry.by == f"{module}.{name}"}
    overridden = set()
    for base in BASES[ours]:
        path, _, base_name = base.partition(":")
        overridden |= own.keys() & parameters_of(VLLM / path, base_name).keys()
    assert overridden - {"__init__"} <= listed


@pytest.mark.parametrize("entry", chain(*PATCHES.values()), ids=lambda e: e.name)
def test_wrappers_are_there(entry: Patch) -> None:
    module, _, name = entry.wrapper.partition(":")
    path = REPO.joinpath(*module.split(".")).with_suffix(".py")
    assert parameters_of(path, "")[name] == ["original"]
    assert set(entry.versions) <= VERIFIED.keys()


def test_nothing_is_patched_elsewhere() -> None:
    """Whoever patches does so through the list."""
    callers = []
    for path in PLUGIN.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("patch", "compat.patch"):
                callers.append(path.name)
    assert callers == ["patches.py"]


def test_the_page_is_made_from_the_lists() -> None:
    assert patch_table.PAGE.read_text() == patch_table.page(), "run tools/patch_table.py"
