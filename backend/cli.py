"""The `slos-serve` command: a table of subcommands, each in its own module, loaded only when it is called.

Promises that a wrong argument or a failing file ends with one line of text and exit code 2, never with a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from .runtime import StartError


@dataclass(frozen=True, slots=True)
class Subcommand:
    """A module with `add_arguments(parser)` and `run(args) -> int`, and its line in the help."""

    module: str
    help: str


SUBCOMMANDS: Final[Mapping[str, Subcommand]] = {
    "serve": Subcommand("slos_serve.backend.launcher", "start the Triton server on a model repository"),
    "probe": Subcommand("slos_serve.backend.probe", "ask a running server for a token; ends with 1 when it is dead"),
    "demo": Subcommand("slos_serve.loadtest.demo", "start a server, play a minute of mixed traffic, show the result"),
    "demo-router": Subcommand("slos_serve.loadtest.demo_router", "three instances, a router, and one instance killed"),
    "bench-router": Subcommand("slos_serve.loadtest.bench_router", "what a router costs, as ratios in one run"),
    "bench-faults": Subcommand("slos_serve.loadtest.bench_faults", "the longest gap that callers see at a failure"),
    "study-dispatch": Subcommand("slos_serve.loadtest.study_dispatch", "ways to choose an instance, in virtual time"),
    "profile": Subcommand("slos_serve.backend.profiling", "measure this machine and fit the time model"),
    "train": Subcommand("slos_serve.backend.train", "train the small demonstration models"),
    "admit": Subcommand("slos_serve.backend.admit_file", "admission decisions for planning problems in a file"),
    "replay": Subcommand("slos_serve.backend.replay_file", "check that a recorded run's plans are made again"),
    "reality": Subcommand("slos_serve.loadtest.reality", "the simulator's prediction against the real server"),
    "exam": Subcommand("slos_serve.loadtest.exam", "capacity of each policy within its SLOs, in virtual time"),
    "plan": Subcommand("slos_serve.loadtest.plan", "how many replicas a trace needs to keep its promises"),
    "exam-report": Subcommand("slos_serve.loadtest.exam_report", "draw the results of an exam as one HTML page"),
    "pack-traces": Subcommand("slos_serve.loadtest.traces", "rebuild the compact trace data from the public files"),
    "trtllm-check": Subcommand("slos_serve.backend.trtllm_check", "try the planner inside TensorRT-LLM on this GPU"),
    "gpu-check": Subcommand(
        "slos_serve.backend.gpu_check", "correctness and speed on a GPU, measured beside simulated"
    ),
    "bench-vllm": Subcommand("slos_serve.loadtest.bench_vllm", "vLLM's scheduler and ours inside vLLM, the same load"),
    "bench-engine": Subcommand("slos_serve.backend.bench_engine", "measure the engine's tokens per second"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code: 2 for what the caller can mend, 130 when interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    name = given[0] if given else ""
    try:
        module = importlib.import_module(SUBCOMMANDS[name].module) if name in SUBCOMMANDS else None
        args = _parser(name, module).parse_args(given)
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(f"slos-serve {name}: needs {error.name}: `pip install 'slos-serve[server,loadtest]'`", file=sys.stderr)
        return 2
    except (StartError, ValueError, OSError) as error:
        print(f"slos-serve {name}: {error}", file=sys.stderr)
        return 2


def _parser(name: str, module: ModuleType | None) -> argparse.ArgumentParser:
    """The whole table for `--help`, and the arguments of the one subcommand that was called."""
    parser = argparse.ArgumentParser(prog="slos-serve", description="LLM serving under SLOs, in Triton.")
    table = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    for each, subcommand in SUBCOMMANDS.items():
        child = table.add_parser(each, help=subcommand.help, description=subcommand.help)
        if module is not None and each == name:
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
