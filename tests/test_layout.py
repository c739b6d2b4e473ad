"""Who may import whom, read from the syntax trees; and that what is shipped is what lies in the folders."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = ("scheduler", "backend", "client", "loadtest")
OURS = "slos_serve"

# What a package may import from the others, and from outside the standard library.
ALLOWED = {
    "scheduler": {"numpy", "numba"},
    "client": {"numpy", "tritonclient", "grpc", "aiohttp"},
    "backend": {
        *(f"{OURS}.scheduler", f"{OURS}.client.wire"),
        *("numpy", "torch", "transformers", "tokenizers", "safetensors", "triton_python_backend_utils", "tensorrt_llm"),
        *("grpc", "tritonclient", "vllm", "numba", "llvmlite"),
    },
    "loadtest": {*(f"{OURS}.scheduler", f"{OURS}.client"), *("numpy", "aiohttp", "locust", "gevent", "matplotlib")},
}
# The planner is told the time and is called by others' loops: it has no clock, thread, file system or log of its own.
IMPURE = {"time", "threading", "asyncio", "logging", "os", "socket", "subprocess", "multiprocessing", "random"}
# Import of these is confined to one module of its package.
CONFINED = {
    "numba": {"scheduler/jit.py", "backend/lanes.py"},
    "llvmlite": {"backend/lanes.py"},
    "locust": {"loadtest/locustfile.py"},
    "tensorrt_llm": {"backend/trtllm_scheduler.py"},
    "vllm": {"backend/vllm_scheduler.py", "backend/vllm_steps.py"},
}


def sources(folder: str) -> list[Path]:
    """The Python files of a folder; packages are flat."""
    return sorted((ROOT / folder).glob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports anywhere; relative ones as part of its package."""
    package = f"{OURS}.{path.parent.name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}: packages are flat, import from '.' only"
            base = f"{package}.{node.module or ''}".rstrip(".") if node.level else str(node.module)
            # `from slos_serve.client import wire` imports the module wire, not what the package offers.
            yield from (f"{base}.{alias.name}" if base.startswith(OURS) else base for alias in node.names)


def covers(allowed: str, name: str) -> bool:
    """Whether a permitted module is the named one or holds it."""
    return name == allowed or name.startswith(f"{allowed}.")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    """The import table holds for every import statement, also those inside functions."""
    allowed = {f"{OURS}.{package}", *ALLOWED[package]}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.partition(".")[0] not in sys.stdlib_module_names and not any(covers(each, name) for each in allowed)
    ]
    assert wrong == []


def test_the_scheduler_is_pure() -> None:
    """Time, threads, files and logs stay outside the planner."""
    wrong = [
        f"{path.name} imports {name}"
        for path in sources("scheduler")
        for name in imports(path)
        if name.partition(".")[0] in IMPURE
    ]
    assert wrong == []


@pytest.mark.parametrize("name", CONFINED)
def test_a_library_stays_in_its_one_module(name: str) -> None:
    """A reader finds all that depends on this library in one place."""
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in sources(package)
        if any(covers(name, each) for each in imports(path))
    }
    assert found <= CONFINED[name]


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_nobody_imports_by_the_bare_folder_name(folder: str) -> None:
    """`import scheduler` works from the repository's root, and brings a second, unequal copy of every class."""
    wrong = [
        (path.name, name) for path in sources(folder) for name in imports(path) if name.partition(".")[0] in PACKAGES
    ]
    assert wrong == []


def test_no_bare_name_was_imported() -> None:
    """The tests run against the installed packages, not against the folders."""
    assert [name for name in PACKAGES if name in sys.modules] == []


def test_the_package_list_is_that_of_the_folders() -> None:
    """The list in pyproject.toml is explicit: a folder missing there is missing for the user, without a word."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(tool["packages"]) == sorted(f"{OURS}.{package}" for package in PACKAGES)
    assert tool["package-dir"] == {f"{OURS}.{package}": package for package in PACKAGES}
    assert [str(path) for package in PACKAGES for path in (ROOT / package).glob("*/**/*.py")] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_that_it_is_typed(package: str) -> None:
    """The marker is shipped with each package, since the name they share is no package of its own."""
    spec = importlib.util.find_spec(f"{OURS}.{package}")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_installed_is_what_lies_here(package: str) -> None:
    """Tests of an outdated installation would prove nothing."""
    spec = importlib.util.find_spec(f"{OURS}.{package}")
    assert spec is not None
    installed = Path(str(spec.origin)).parent
    assert [path.name for path in sources(package) if path.read_bytes() != (installed / path.name).read_bytes()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_shadows_another(package: str) -> None:
    """A file run by its path puts its folder first on the path, and then the standard library imports ours."""
    taken = {*sys.stdlib_module_names, "triton", "numba", "torch", "locust"}
    assert sorted(path.stem for path in sources(package) if path.stem in taken) == []


def test_the_backend_s_entry_is_a_shim() -> None:
    """Triton appends the backend's folder to the path: whatever else lay there could be shadowed by any package."""
    body = ast.parse((ROOT / "backend/model.py").read_text(encoding="utf-8")).body
    assert [type(node) for node in body] == [ast.Expr, ast.ImportFrom]
    assert list(imports(ROOT / "backend/model.py")) == [f"{OURS}.backend.python_model.TritonPythonModel"]
