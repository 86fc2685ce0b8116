"""Build an environment in which vLLM runs its Model Runner V2 on a CPU.

    python3.11 tools/setup_v2.py [FOLDER] [BASE]     (default: .venv-v2 .venv)

FOLDER becomes a virtual environment that looks up modules first in itself, then in BASE (of
setup_env.py or setup_next.py). It holds Triton, which BASE cannot (see setup_env.py), and turns on
its interpreter and V2 (triton_on_cpu.py). Everything is slow there, and right.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import setup_env as base_env
from setup_env import REPO, STAMP, site_packages
from setup_next import install_beside

LOCK = REPO / "requirements" / "v2.txt"
PRETENCE = Path(__file__).resolve().with_name("triton_on_cpu.py")


def main(arguments: list[str]) -> None:
    """Set up the environment in the first folder of `arguments` over that in the second."""
    given = dict(enumerate(arguments))
    folder = Path(given.get(0, REPO / ".venv-v2")).absolute()
    base = Path(given.get(1, REPO / ".venv")).absolute()
    pip_of = Path(given.get(2, base)).absolute()
    set_up(folder, base, pip_of)


def set_up(folder: Path, base: Path, pip_of: Path) -> None:
    """Make `folder` an environment for V2 over `base`, unless it is that already.

    `pip_of` is the environment whose pip installs: `base`, or the one below it.
    """
    sources = [base / STAMP, LOCK, PRETENCE, Path(__file__).resolve()]
    fingerprint = base_env.fingerprint_of(sources)
    if base_env.is_current(folder, fingerprint):
        return
    with base_env.one_at_a_time(folder):
        if base_env.is_current(folder, fingerprint):
            return
        (folder / STAMP).unlink(missing_ok=True)
        base_env.create_venv(folder, with_pip=False)
        site = site_packages(folder)
        (site / "base.pth").write_text(
            f"import site; site.addsitedir({str(site_packages(base))!r})\n"
        )
        install_beside(site, pip_of, base_env.read_pins(LOCK))
        shutil.copy(PRETENCE, site / PRETENCE.name)
        (site / "triton_on_cpu.pth").write_text(f"import {PRETENCE.stem}\n")
        (folder / STAMP).write_text(fingerprint + "\n")
    print(f"{base_env.shown(folder)} is ready")


if __name__ == "__main__":
    raise SystemExit(base_env.exit_status(main))
