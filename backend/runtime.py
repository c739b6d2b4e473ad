"""Finds the tritonserver binary and lays out what it needs to load our backend.

Promises that whatever stops the server from starting on this machine is told in words that say what to do.
Starts nothing but `ldd`, and writes only into the folder it is given.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONTAINER: Final = Path("/opt/tritonserver")
SHARED_MEMORY: Final = Path("/dev/shm")
SHARED_MEMORY_BYTES: Final = 64 * 2**20
PYTHONS: Final = ((3, 10), (3, 11), (3, 12))
STUB: Final = "triton_python_backend_stub"

# What the server of the wheel takes from the system; everything else it carries.
PACKAGES: Final[Mapping[str, str]] = {
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
    "libz.so.1": "zlib1g",
}


class StartError(RuntimeError):
    """The server cannot start, or did not; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Installation:
    """Where one tritonserver lives. `libraries` is a folder its loader must see, when there is one."""

    binary: Path
    backends: Path
    stub: Path
    libraries: Path | None


def find_installation(container: Path = CONTAINER) -> Installation:
    """The container's own server where there is one, else the one that the nvidia-pytriton wheel carries.

    Raises StartError where there is neither, or where the wheel's has no stub for the running Python.
    """
    if (container / "bin/tritonserver").exists():
        backends = container / "backends"
        return Installation(container / "bin/tritonserver", backends, backends / "python" / STUB, None)
    check_python(sys.version_info[:2])
    spec = importlib.util.find_spec("pytriton")  # found, not imported: the wheel is only a box of binaries here
    if spec is None or not spec.submodule_search_locations:
        raise StartError(
            f"no tritonserver: neither {container}/bin/tritonserver nor the Python package nvidia-pytriton is there;"
            " run `pip install nvidia-pytriton==0.7.0`, or start in NVIDIA's Triton container"
        )
    package = Path(spec.submodule_search_locations[0])
    root = package / "tritonserver"
    stub = root / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / STUB
    return Installation(root / "bin/tritonserver", root / "backends", stub, package.parent / "nvidia_pytriton.libs")


def check_python(version: tuple[int, int]) -> None:
    """Raises StartError unless the server's Python stub exists for this version of Python."""
    if version not in PYTHONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        raise StartError(
            f"Python {version[0]}.{version[1]} is not supported: use one of {known}"
            " (for instance `make PYTHON=python3.11 demo`)"
        )


def assemble(installation: Installation, folder: Path) -> Path:
    """A backend directory in `folder`: every backend of the installation, and ours. Returns its path."""
    backends = folder / "backends"
    backends.mkdir(parents=True)
    for source in sorted(installation.backends.iterdir()):
        if source.name == "python" and not (source / STUB).exists():
            _assemble_python(source, installation.stub, backends / "python")
        elif source.name != "slos_serve":
            (backends / source.name).symlink_to(source)
    ours = backends / "slos_serve"
    ours.mkdir()
    shutil.copy(Path(__file__).with_name("model.py"), ours / "model.py")
    return backends


def _assemble_python(source: Path, stub: Path, target: Path) -> None:
    """The wheel keeps the stubs apart: bring library and stub together. Triton refuses a symlinked library."""
    target.mkdir()
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy(source / name, target / name)
    (target / STUB).symlink_to(stub)


def environment(installation: Installation, folder: Path) -> dict[str, str]:
    """The environment in which the stub finds this Python: its packages through PATH, its library through the loader.

    libpython is linked alone into a folder of its own, so that no other library of its folder shadows the system's.
    """
    libraries = folder / "lib"
    libraries.mkdir(exist_ok=True)
    libpython = find_libpython()
    if libpython is not None:
        (libraries / libpython.name).symlink_to(libpython)
    paths = [str(libraries)]
    paths += [str(installation.libraries)] if installation.libraries else []
    paths += [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths), "PATH": path}


def find_libpython() -> Path | None:
    """The running Python's shared library, or None where it has none beside it (the system may still have it)."""
    name = "libpython{}.{}.so.1.0".format(*sys.version_info)
    prefix = Path(sys.base_prefix) / "lib"
    folders = [Path(sysconfig.get_config_var("LIBDIR") or prefix), prefix]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    if multiarch:
        folders += [folder / multiarch for folder in folders]
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def check_libraries(installation: Installation, env: Mapping[str, str]) -> None:
    """Raises StartError naming every shared library that the server or its Python stub would miss."""
    problems: list[str] = []
    for program in (installation.binary, installation.stub):
        if not program.exists():
            raise StartError(f"{program} is missing: the installation of tritonserver is incomplete, install it again")
        try:
            run = subprocess.run(["ldd", program], env=dict(env), capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return  # no ldd, no forecast: the loader itself will tell
        problems += [problem for problem in missing_libraries(run.stdout + run.stderr) if problem not in problems]
        if program == installation.stub:
            problems += _stub_mismatch(run.stdout)
    if problems:
        raise StartError("tritonserver cannot run here:\n  " + "\n  ".join(problems))


def missing_libraries(ldd: str) -> Iterator[str]:
    """What `ldd` said is missing, one sentence each, with the Debian package or the step that brings it."""
    for name in dict.fromkeys(re.findall(r"^\s*(\S+) => not found", ldd, re.MULTILINE)):
        python = re.match(r"libpython(3\.\d+)\.so", name)
        if python:
            yield (
                f"{name} is missing: `apt-get install libpython{python[1]}` for the system's Python, or build yours"
                " with --enable-shared (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)"
            )
        elif name in PACKAGES:
            yield f"{name} is missing: `apt-get install {PACKAGES[name]}`"
        else:
            yield f"{name} is missing: install the package that holds it"
    for version in sorted(set(re.findall(r"version `(GLIBC(?:XX)?_[\d.]+)' not found", ldd))):
        yield f"{version} is missing: the system is too old, use Debian 12, Ubuntu 22.04 or newer, or the container"


def _stub_mismatch(ldd: str) -> list[str]:
    """A container's stub is built for one Python, which must be the one that our packages are installed in."""
    linked = re.search(r"libpython(\d+)\.(\d+)\.so", ldd)
    if not linked or (int(linked[1]), int(linked[2])) == sys.version_info[:2]:
        return []
    return [
        f"this server runs Python {linked[1]}.{linked[2]} and slos-serve is installed in"
        f" {sys.version_info[0]}.{sys.version_info[1]}: install it with the former's pip"
    ]


def check_shared_memory(path: Path = SHARED_MEMORY) -> None:
    """Raises StartError where the memory that server and stub share is missing or too small."""
    try:
        disk = os.statvfs(path)
    except OSError as error:
        raise StartError(f"{path} is not usable ({error.strerror}): server and model need shared memory") from error
    free = disk.f_bavail * disk.f_frsize
    if free < SHARED_MEMORY_BYTES:
        raise StartError(
            f"{path} has {free >> 20} MB free and {SHARED_MEMORY_BYTES >> 20} MB are needed:"
            " `docker run --shm-size=1g`, or remove what fills it"
        )


def check_port(address: str, port: int, option: str) -> None:
    """Raises StartError when something listens on the port already."""
    if not 0 < port < 65536:
        raise StartError(f"{option}: expected a port from 0 (any free one) to 65535, got {port}")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise StartError(
                f"port {port} on {address} cannot be used ({error.strerror}): choose another with {option}=PORT,"
                f" or any free one with {option}=0"
            ) from error


def check_repository(paths: Iterable[str], *, may_be_empty: bool) -> None:
    """Raises StartError unless every local model repository is a folder with a model in it. Remote ones pass."""
    given = list(paths)
    if not given:
        raise StartError("no model repository: give --model-repository=DIR")
    for text in given:
        if "://" in text:
            continue
        path = Path(text)
        if not path.is_dir():
            raise StartError(f"model repository {text!r} is not a folder: give --model-repository=DIR")
        if not may_be_empty and not any(child.is_dir() for child in path.iterdir()):
            raise StartError(f"model repository {text!r} holds no model: a model is a folder with config.pbtxt and 1/")
