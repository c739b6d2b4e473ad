"""The entry point that Triton loads for a router."""

from slos_serve.backend.router_model import TritonPythonModel  # noqa: F401
