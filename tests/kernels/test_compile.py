"""Triton's compiler takes every kernel, though no GPU is there to run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
KERNELS = {
    name
    for path in (REPO / "vllm_medusa" / "kernels").glob("*.py")
    for name in re.findall(r"^def (\w*kernel)\(", path.read_text(encoding="utf-8"), re.M)
}


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu", "90"],
        cwd=REPO,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.splitlines()) == {f"{name} for sm_90" for name in KERNELS}
