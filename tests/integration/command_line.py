"""What a user types: vLLM's own parser, `vllm` as a process, and the demo model."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file, save_file

from tests.checkpoints import sequential_tensors
from vllm_medusa.cli.main import main
from vllm_medusa.heads import load_heads

REPO = Path(__file__).parents[2]
DEMO_MODEL = REPO / "demo" / "model"
DEMO_HEADS = REPO / "demo" / "heads"
#: Plain ones: neither do they see the root nor have they a selector.
MEDUSA_HEADS = REPO / "demo" / "medusa-heads"
RECURRENT_HEADS = REPO / "demo" / "recurrent-heads"
VLLM = str(Path(sys.executable).with_name("vllm"))


@cache
def vllm_parser() -> Any:
    """The parser of the ``vllm`` command, with ``vllm serve`` in it."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


def serve_arguments(model: Path, *argv: str) -> Any:
    """``AsyncEngineArgs`` of ``vllm serve MODEL ARGV...``."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = vllm_parser().parse_args(["serve", str(model), *argv])
    args.model = args.model_tag
    return AsyncEngineArgs.from_cli_args(args)


def engine_config(model: Path, speculative_config: Any = None, **arguments: Any) -> Any:
    """The ``VllmConfig`` of ``LLM(MODEL, speculative_config=..., ...)``, without an engine."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(model), speculative_config=speculative_config, **arguments
    ).create_engine_config()


def merge_heads(model: Path, heads: Path, directory: Path, prefix: str | None) -> Path:
    """Copy a model with heads into one directory.

    Args:
        model: directory of the target model.
        heads: heads that use the target's lm_head, in any format.
        directory: where to write.
        prefix: of the heads' tensors among the model's own; None: heads in a file beside it.

    """
    shutil.copytree(model, directory)
    tree = heads / "medusa_tree.json"
    if tree.exists():
        shutil.copy(tree, directory)
    own = sequential_tensors(load_heads(heads), prefix or "")
    if prefix is None:
        save_file(own, directory / "medusa_lm_head.safetensors")
        return directory
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, **own}, directory / "model.safetensors", {"format": "pt"})
    return directory


def run_tool(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """``vllm-medusa ARGV...`` in this process, whose engines share their imports."""
    with (
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        patch.dict(os.environ, environment(), clear=True),
        # pytest's handlers are not there in a tool's own process.
        patch.object(logging.root, "handlers", []),
    ):
        status = main([str(argument) for argument in argv])
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


def run_python(source: str, timeout_s: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user would, with vLLM's default of an engine in its own process."""
    return _run([sys.executable, "-c", source], timeout_s, env)


def run_vllm(*argv: str, timeout_s: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``vllm ARGV...`` to its end."""
    return _run([VLLM, *argv], timeout_s, env)


def environment(**env: str) -> dict[str, str]:
    """This process's environment, without what `tests.conftest` sets for in-process engines."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_PLUGINS")
    }
    return {**inherited, "VLLM_HOST_IP": "127.0.0.1", **env}


def _run(
    command: list[str], timeout_s: float, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own, so that nothing of it survives a timeout."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**env),
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
