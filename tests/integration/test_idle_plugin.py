"""With the plugin installed and Medusa not asked for, vLLM is as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS, run_python
from vllm_medusa.plugin import register as plugin

pytestmark = pytest.mark.engine

# What vLLM makes of the same arguments in a front-end process.
CONFIGURATION = """
import json, re, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

load_general_plugins()
options = dict(
    dtype="float32", max_model_len=256, enforce_eager=True, block_size=32,
    num_gpu_blocks_override=64, distributed_executor_backend="uni", disable_log_stats=False,
)
found = {}
config = EngineArgs(model=MODEL, **options).create_engine_config()
found["config"] = re.sub("instance_id='[^']*'", "", repr(config))
found["hash"] = config.compute_hash()
found["worker_cls"] = config.parallel_config.worker_cls
found["additional_config"] = config.additional_config
found["loads_engine_core"] = "vllm.v1.engine.core" in sys.modules
found["plugin"] = "vllm_medusa" in sys.modules
"""
SAY = """
print("FOUND", json.dumps(found))
"""
# And what it generates, also with a speculation of its own. That comes last because it imports
# numba, after which vLLM's CPU platform can start no other engine in the process
# (`_rebind_kernels`, ``triton_utils/dispatcher.py``, trips over a module of llvmlite).
ENGINE = """
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

llm = LLM(MODEL, **options)
core = llm.llm_engine.engine_core.engine_core
found["num_blocks"] = core.scheduler.kv_cache_config.num_blocks
params = [SamplingParams(temperature=0, max_tokens=30, logprobs=2),
          SamplingParams(temperature=0.8, seed=3, max_tokens=30, min_p=0.05)]
outputs = llm.generate(["def main(", "class Queue:"], params, use_tqdm=False)
found["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
found["logprobs"] = str(outputs[0].outputs[0].logprobs)
found["metrics"] = sorted(metric.name for metric in llm.get_metrics())
worker = core.model_executor.driver_worker.worker
found["runner"] = type(worker.model_runner).__name__
llm.llm_engine.engine_core.shutdown()

ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
llm = LLM(MODEL, speculative_config=ngram, **options)
outputs = llm.generate(["def main(", "class Queue:"], params[0], use_tqdm=False)
found["ngram_tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
found["ngram_accepted"] = [
    metric.value for metric in llm.get_metrics() if metric.name.endswith("num_accepted_tokens")
]
try:
    llm.generate("x", params[1], use_tqdm=False)
except VLLMValidationError as error:
    found["ngram_min_p"] = str(error)
"""

# vLLM's own answer to `medusa`.
OWN_MEDUSA = """
import json
from vllm.engine.arg_utils import EngineArgs

spec = {"method": "medusa", "model": HEADS, "num_speculative_tokens": 4}
try:
    config = EngineArgs(model=MODEL, speculative_config=spec).create_engine_config()
    found = [config.speculative_config.method, config.parallel_config.worker_cls]
    print("FOUND", json.dumps(found))
except ValueError as error:
    print("FOUND", json.dumps(str(error)))
"""

# In a process of its own: numba's modules break vLLM's next engine in the same process
# (`register_triton_kernel_overrides` goes through the attributes of all modules).
NGRAM = """
import json
from vllm import LLM, SamplingParams

options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True,
           "num_gpu_blocks_override": 200, "distributed_executor_backend": "uni",
           "disable_log_stats": False}
spec = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2,
        "prompt_lookup_min": 1}
params = SamplingParams(temperature=0, max_tokens=40)
prompts = ["def main(self):\\n    self.main = self.main\\n    self."] * 2
found = {}
for name, given in (("reference", None), ("tokens", spec)):
    llm = LLM(MODEL, speculative_config=given, **options)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found[name] = [list(output.outputs[0].token_ids) for output in outputs]
    if given is None:
        llm.llm_engine.engine_core.shutdown()
        del llm
metrics = {metric.name: metric for metric in llm.get_metrics()}
found["num_drafts"] = metrics["vllm:spec_decode_num_drafts"].value
try:
    llm.generate(prompts, SamplingParams(min_p=0.1), use_tqdm=False)
except Exception as error:
    found["refusal"] = str(error)
worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
found["runner_module"] = type(worker.model_runner).__module__
print("FOUND", json.dumps(found))
"""


def run(source: str, **env: str) -> Any:
    constants = f"MODEL, HEADS = {str(DEMO_MODEL)!r}, {str(MEDUSA_HEADS)!r}\n"
    result = run_python(constants + source, VLLM_ENABLE_V1_MULTIPROCESSING="0", **env)
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def with_and_without_plugin(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    idle, without = run(source + SAY), run(source + SAY, VLLM_PLUGINS="")
    assert (idle.pop("plugin"), without.pop("plugin")) == (True, False)
    return idle, without


def test_configuration_is_as_without_the_plugin() -> None:
    idle, without = with_and_without_plugin(CONFIGURATION)
    assert not idle["loads_engine_core"]
    assert "medusa" not in idle["config"]
    assert idle == without


@pytest.mark.slow
def test_engine_is_as_without_the_plugin() -> None:
    idle, without = with_and_without_plugin(CONFIGURATION + ENGINE)
    assert idle["runner"] == "CPUModelRunner"
    assert idle["ngram_tokens"][0] == idle["tokens"][0]
    assert idle["ngram_accepted"][0] > 0
    assert "min_p" in idle["ngram_min_p"]
    assert idle == without


def test_without_the_plugin_medusa_is_what_vllm_makes_of_it() -> None:
    import vllm

    found = run(OWN_MEDUSA, VLLM_PLUGINS="")
    if vllm.__version__.startswith("0.32"):
        assert found == ["medusa", "vllm.v1.worker.cpu_worker.CPUWorker"]
    else:
        assert "medusa" in found


def test_registering_again_changes_nothing(tiny_model: Path) -> None:
    EngineArgs(model=str(tiny_model), skip_tokenizer_init=True)  # loads the plugins
    before = (
        EngineArgs.create_engine_config,
        EngineArgs.add_cli_args,
        SamplingParams._validate_spec_decode,
        sys.excepthook,
    )
    plugin.register()
    plugin.register()
    assert before == (
        EngineArgs.create_engine_config,
        EngineArgs.add_cli_args,
        SamplingParams._validate_spec_decode,
        sys.excepthook,
    )


def test_signature_of_what_is_patched() -> None:
    """The wrappers keep vLLM's names and documentation, for whoever reads a traceback."""
    assert EngineArgs.create_engine_config.__qualname__ == "EngineArgs.create_engine_config"
    assert EngineArgs.add_cli_args.__module__ == "vllm.engine.arg_utils"
