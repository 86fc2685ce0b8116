"""The worker class of the platform, with our model runner.

vLLM looks up ``parallel_config.worker_cls`` by name in every worker process. The class is built at
that moment, because the platform is not known earlier.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vllm_medusa.errors import UserError
from vllm_medusa.plugin import overrides, patches
from vllm_medusa.plugin.compat import replaced
from vllm_medusa.plugin.one_line_errors import exit_in_one_line, handed_over
from vllm_medusa.plugin.worker import timers

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object


def __getattr__(name: str) -> Any:
    """Build ``MedusaWorker`` when it is first asked for."""
    if name != "MedusaWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    worker = _build_worker()
    globals()[name] = worker
    return worker


def _build_worker() -> type:
    from vllm.platforms import current_platform

    patches.apply("worker")
    overrides.check("worker")
    overrides.check("V1")
    return _build_cpu_worker() if current_platform.is_cpu() else _build_gpu_worker()


class _WorkerMixin(_Base):
    model_runner: Any
    use_v2_model_runner: bool
    _timers: timers.StepTimers | None = None

    # In the first two methods vLLM starts the worker, whose process can end. In the others vLLM
    # waits for the worker's answer.

    def init_device(self) -> None:
        with exit_in_one_line():
            super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with exit_in_one_line():
            super().load_model(*args, **kwargs)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        with handed_over():
            super().initialize_from_config(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        """Let the runner measure what dynamic trees need (V1) once vLLM has warmed up."""
        with handed_over():
            result = super().compile_or_warm_up_model()
            if not self.use_v2_model_runner:
                self.model_runner.prepare_drafting()
            return result

    def medusa_counters(self) -> dict[str, int]:
        """Return the plugin's counters, for ``LLM.collective_rpc("medusa_counters")``."""
        return self.model_runner.counters.to_dict()

    def medusa_step_times(self) -> list[dict[str, float]]:
        """Return the stages of every step since the last call, in milliseconds (`timers`).

        The first call starts the timers; without ``VLLM_MEDUSA_TIMERS=1`` the result is always
        empty.
        """
        if self._timers is None and timers.are_wanted():
            if self.use_v2_model_runner:
                raise UserError(
                    f"{timers.VARIABLE}=1 times the steps of Model Runner V1 only; set "
                    "VLLM_USE_V2_MODEL_RUNNER=0 too, or leave it out"
                )
            self._timers = timers.StepTimers(self.model_runner)
        return [] if self._timers is None else self._timers.take()


def _build_cpu_worker() -> type:
    from vllm.v1.worker import cpu_worker
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from vllm_medusa.plugin.worker.v1.runner import MedusaRunnerMixin

    class MedusaCPUModelRunner(MedusaRunnerMixin, CPUModelRunner):
        pass

    class MedusaWorker(_WorkerMixin, cpu_worker.CPUWorker):
        def init_device(self) -> None:
            # The CPU worker names its runner's class inside init_device (cpu_worker.py).
            with self._our_runner():
                super().init_device()

        def _our_runner(self) -> AbstractContextManager[None]:
            if not self.vllm_config.use_v2_model_runner:
                return replaced(cpu_worker, "CPUModelRunner", MedusaCPUModelRunner)
            from vllm.v1.worker.cpu import model_runner

            v2_runner = _v2_runner(model_runner.CPUModelRunner)
            return replaced(model_runner, "CPUModelRunner", v2_runner)

    return MedusaWorker


def _build_gpu_worker() -> type:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_medusa.plugin.worker.v1.runner import MedusaRunnerMixin

    class MedusaGPUModelRunner(MedusaRunnerMixin, GPUModelRunner):
        pass

    class MedusaWorker(_WorkerMixin, Worker):
        def _make_model_runner(self) -> GPUModelRunner:
            if not self.vllm_config.use_v2_model_runner:
                return MedusaGPUModelRunner(self.vllm_config, self.device)
            from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner

            return _v2_runner(V2ModelRunner)(self.vllm_config, self.device)

    return MedusaWorker


def _v2_runner(base: type) -> type:
    from vllm_medusa.plugin.worker.v2.runner import TreeRunnerMixin

    overrides.check("V2")
    return type(f"Medusa{base.__name__}V2", (TreeRunnerMixin, base), {})
