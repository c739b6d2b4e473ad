"""Where each rank creates its executor."""

from typing import Any

from .py_executor import PyExecutor


def create_py_executor(*args: Any, **kwargs: Any) -> PyExecutor:
    return PyExecutor(*args, **kwargs)
