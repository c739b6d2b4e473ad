"""Triton loads this file as the backend; the code is in the installed package."""
from slos_serve.backend.python_model import TritonPythonModel as TritonPythonModel
