"""Step costs in a file, so that later starts of the engine need not measure them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.platforms import current_platform

from vllm_medusa import __version__
from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.errors import UserError
from vllm_medusa.files import read_json, write_json
from vllm_medusa.plugin.compat import plugin_logger, vllm_version
from vllm_medusa.reporting.provenance import cpu_name

logger = plugin_logger(__name__)

#: Raised when other things are measured, so that older files are not read.
_FORM = 6


@dataclass(frozen=True)
class CostFile:
    """The costs of one model with its heads, on one kind of machine.

    Attributes:
        facts: everything that decides the step costs; the file repeats them.

    """

    facts: dict[str, Any]

    @classmethod
    def of(cls, runner: Any) -> CostFile:
        """Gather the facts of a model runner."""
        model, parallel = runner.model_config, runner.parallel_config
        compilation, config = runner.compilation_config, runner.drafter.config
        on_cpu = runner.device.type == "cpu"
        facts = {
            "form": _FORM,
            "model": [model.model, model.revision, model.compute_hash()],
            "heads": [config.heads, config.revision, config.tree.depth, config.tree.top_k],
            "dtype": str(runner.dtype),
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "max_num_tokens": runner.max_num_tokens,
            "compilation": [str(compilation.mode), str(compilation.cudagraph_mode)],
            "device": cpu_name() if on_cpu else current_platform.get_device_name(),
            "threads": torch.get_num_threads() if on_cpu else None,
            "versions": [vllm_version(), torch.__version__, __version__],
        }
        return cls(facts)

    @property
    def path(self) -> Path:
        """Path of the file."""
        name = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        return Path(envs.VLLM_CACHE_ROOT) / "medusa_step_costs" / f"{name}.json"

    def read(self) -> CostCurve | None:
        """Return the costs, or None if there are none or the file is damaged."""
        if not self.path.exists():
            return None
        try:
            values = read_json(self.path, "step costs")
            return CostCurve.from_dict(values["costs"]) if values["facts"] == self.facts else None
        except (KeyError, UserError) as error:
            logger.warning(
                "Medusa: step costs are measured again: %s is damaged: %s", self.path, error
            )
            return None

    def write(self, costs: CostCurve) -> bool:
        """Write the costs; return whether that was possible."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"facts": self.facts, "costs": costs.to_dict()})
        except (OSError, UserError) as error:
            logger.warning("Medusa: step costs will be measured at every start: %s", error)
            return False
        return True
