"""How long vLLM's iterations take on this machine's CPU: the same batches that `bench-engine` gives to our engine.

    ENV/bin/python vllm_steps.py FOLDER --dtype bfloat16 --threads 1 --context 512 --decodes 1 8 --prompts 256

Runs by its path in vLLM's own environment and imports nothing of this package. Prints one JSON object: least
seconds of an iteration of so many decodes, and of one prompt of so many tokens, and how many cores were busy
meanwhile. Prefix caching is off.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--decodes", type=int, nargs="*", default=[])
    parser.add_argument("--prompts", type=int, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))[-args.threads :]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # iterations run where we can time them
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    steps = _Steps(args)
    found = {
        "decodes": {count: steps.decode(count, args.context) for count in args.decodes},
        "prompts": {count: steps.prompt(count) for count in args.prompts},
        "cores": {"busy": steps.busy_seconds / steps.seconds},
    }
    print(json.dumps(found))
    return 0


class _Steps:
    """vLLM's engine with prompts of random tokens, one iteration at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm import LLM

        longest = max([args.context + args.repeats + 8, *(count + 2 for count in args.prompts)])
        self._repeats = args.repeats
        self._random = random.Random(0)
        self._engine: Any = LLM(
            str(args.folder), dtype=args.dtype, max_model_len=longest, max_num_seqs=max([1, *args.decodes]),
            max_num_batched_tokens=max(2048, longest), enable_prefix_caching=False, skip_tokenizer_init=True,
        ).llm_engine  # fmt: skip
        self._vocabulary = int(json.loads((args.folder / "config.json").read_text())["vocab_size"])
        self._count = 0
        self.seconds = self.busy_seconds = 0.0  # of all measured iterations, by the clock and of the cores

    def decode(self, count: int, context: int) -> float:
        """Least seconds of an iteration of `count` decodes from `context` tokens on."""
        names = {self._add(context, self._repeats + count + 8) for _ in range(count)}
        waiting = set(names)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}
        seconds = min(self._step() for _ in range(self._repeats))
        self._engine.abort_request(list(names))
        self._step()
        return seconds

    def prompt(self, tokens: int) -> float:
        """Least seconds of an iteration that computes one new prompt."""
        times = []
        for _ in range(self._repeats):
            self._add(tokens, 1)
            times.append(self._step())
        return min(times)

    def _add(self, tokens: int, new_tokens: int) -> str:
        from vllm import SamplingParams

        self._count += 1
        ids = [self._random.randrange(3, self._vocabulary) for _ in range(tokens)]
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._count), {"prompt_token_ids": ids}, sampling)
        return str(self._count)

    def _step(self) -> float:
        started, busy = time.perf_counter(), time.process_time()
        self._engine.step()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.busy_seconds += time.process_time() - busy
        return seconds


if __name__ == "__main__":
    sys.exit(main())
