"""Run by a Python that has vLLM: its real scheduler with our planner inside, the model replaced by made-up tokens.

    python tests/standin/vllm_drive.py MODEL_FOLDER

At every step vLLM must schedule exactly the planned tokens and preempt exactly whom the planner evicts, and both
must count the same free blocks. Requests arrive, end and are aborted at random, and memory is short.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from slos_serve.backend.vllm_scheduler import SloScheduler

BLOCKS, BLOCK_TOKENS, REQUESTS = 40, 32, 60
SLO = {"slo_ttft_ms": 4000.0, "slo_tpot_ms": 400.0, "slo_class": "chat"}


def scheduler(model: str) -> Any:
    config = EngineArgs(
        model=model, max_model_len=512, max_num_seqs=6, max_num_batched_tokens=128, block_size=BLOCK_TOKENS,
        enable_prefix_caching=False, async_scheduling=False, dtype="bfloat16",
    ).create_engine_config()  # fmt: skip
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=8, head_size=64, dtype=torch.bfloat16)
    groups = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return SloScheduler(config, groups, StructuredOutputManager(config), block_size=BLOCK_TOKENS)


class Drive:
    """What happened so far."""

    def __init__(self, steered: Any) -> None:
        self.steered = steered
        self.chance = random.Random(0)
        self.live: dict[str, Request] = {}
        self.counts = {"added": 0, "done": 0, "aborted": 0, "evicted": 0, "steps": 0}

    def add(self) -> None:
        chance, number = self.chance, self.counts["added"]
        asked = SLO if chance.random() < 0.6 else None
        sampling = SamplingParams(max_tokens=chance.randint(1, 60), ignore_eos=True, extra_args=asked)
        prompt = [5] * chance.randint(1, 400)
        request = Request(f"r{number}", prompt, sampling, None, arrival_time=time.time())
        self.steered.add_request(request)
        self.live[request.request_id] = request
        self.counts["added"] += 1

    def abort(self) -> None:
        if self.live and self.chance.random() < 0.02:
            name = self.chance.choice(list(self.live))
            self.steered.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            del self.live[name]
            self.counts["aborted"] += 1

    def step(self) -> None:
        steered = self.steered
        output = steered.schedule()
        orders = steered._orders
        assert orders is not None, "vLLM could run nothing of the plan before"
        assert dict(output.num_scheduled_tokens) == dict(orders.tokens), (output.num_scheduled_tokens, orders)
        assert set(output.preempted_req_ids or ()) == set(orders.evicted)
        names = list(output.num_scheduled_tokens)
        sampled = [[] if steered.requests[name].is_prefill_chunk else [7] for name in names]
        self.abort()
        index = {name: number for number, name in enumerate(names)}
        steered.update_from_output(
            output, ModelRunnerOutput(req_ids=names, req_id_to_index=index, sampled_token_ids=sampled)
        )
        assert steered._seat is not None, "the planner failed"
        free = steered.kv_cache_manager.block_pool.get_num_free_blocks()
        assert steered._seat._planner.snapshot().free_blocks == free
        self.counts["steps"] += 1
        self.counts["evicted"] += len(orders.evicted)
        for name in [name for name, request in self.live.items() if request.is_finished()]:
            request = self.live.pop(name)
            assert request.num_output_tokens == request.max_tokens
            self.counts["done"] += 1


def main(model: str) -> None:
    drive = Drive(scheduler(model))
    while drive.counts["added"] < REQUESTS or drive.live:
        if drive.counts["added"] < REQUESTS and len(drive.live) < 14 and drive.chance.random() < 0.5:
            drive.add()
        drive.abort()
        drive.step()
        assert drive.counts["steps"] < 5000
    print(json.dumps(drive.counts))


if __name__ == "__main__":
    main(sys.argv[1])
