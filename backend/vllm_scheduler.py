"""`vllm serve ... --scheduler-cls slos_serve.backend.vllm_scheduler.SloScheduler --no-async-scheduling`

vLLM's V1 scheduler with our planner in the place of its policy. vLLM still owns KV blocks, prefix cache, structured
output and what goes to the workers: `schedule` of the parent runs as it is, but in the order of our plan and with at
most the planned tokens of each request, through the one hook that it passes every request's token count through.

Environment: `SLOS_SERVE_PROFILE` is a file for the time model, read where it exists and written where not.
Written for vLLM 0.32 (`vllm/v1/core/sched/scheduler.py`); the only module that imports vLLM.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler as Stock

from slos_serve.scheduler import Advance, Capabilities, Request, Scheduler, Slo, Stage, StepReport

from .vllm_seat import UNMEASURED, Orders, Seat

log = logging.getLogger(__name__)

UNBOUNDED: Final = 1 << 20


class SloScheduler(Stock):  # type: ignore[misc]
    """One engine core's scheduler. A planner that fails is not asked again: vLLM's own policy goes on."""

    def __init__(self, vllm_config: Any, *args: Any, **settings: Any) -> None:
        """Raises ValueError, naming the option, for what the planner cannot steer."""
        super().__init__(vllm_config, *args, **settings)
        logging.getLogger("slos_serve").parent = logging.getLogger("vllm")  # our words go where vLLM's go
        _check(vllm_config, len(self.kv_cache_config.kv_cache_groups))
        self.policy = SchedulingPolicy.FCFS  # the order is the plan's
        self.waiting = create_request_queue(self.policy)
        self.scheduler_reserve_full_isl = False  # the planner knows how long a request will be
        capabilities = Capabilities(
            num_blocks=self.kv_cache_manager.block_pool.num_gpu_blocks - 1,  # vLLM keeps one as null
            block_tokens=self.block_size,
            max_batch_tokens=self.max_num_scheduled_tokens,
            max_batch_requests=vllm_config.scheduler_config.max_num_seqs,
            max_context=self.max_model_len,
        )
        if not self.use_v2_model_runner:
            # A request that pauses keeps its KV but no row in the batch, so more may be started than run at once.
            self.max_num_running_reqs = self.max_num_active_reqs = UNBOUNDED
        profile = os.environ.get("SLOS_SERVE_PROFILE")
        self._seat: Seat | None = Seat(
            partial(Scheduler, capabilities), time.monotonic, time.time, Path(profile) if profile else None
        )
        self._orders: Orders | None = None  # None: the stock's policy decides
        self._ran = True  # whether the last orders changed anything, where anybody was there
        _compile(capabilities)
        log.info("slos_serve plans: %s, %s", capabilities, self._seat.perf)

    def schedule(self, *args: Any, **settings: Any) -> Any:
        """The parent's, steered. After a batch that vLLM could run nothing of, one of its own choice."""
        was_stuck = self._orders is not None and not self._ran
        self._orders = None if was_stuck else self._ask()
        if self._orders is not None:
            self._carry_out(self._orders)
        output = super().schedule(*args, **settings)
        dropped = self._orders is not None and bool(self._orders.evicted)
        self._ran = dropped or output.total_num_scheduled_tokens > 0 or not self.requests
        return output

    def update_from_output(self, *args: Any, **settings: Any) -> Any:
        outputs = super().update_from_output(*args, **settings)
        if self._seat is not None:
            try:
                self._seat.report()
            except Exception:
                self._leave()
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, *args: Any, **settings: Any) -> Any:
        aborted = super().finish_requests(request_ids, *args, **settings)
        if self._seat is not None:
            for request in aborted:
                self._seat.cancel(request.request_id)
        return aborted

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """The hook: tokens of one request in this batch. 0 leaves a running request out, and ends the waiting ones."""
        count: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return count if self._orders is None else min(count, self._orders.tokens.get(request.request_id, 0))

    def _ask(self) -> Orders | None:
        """The planner's orders about all requests that could run; None where it is not asked."""
        if self._seat is None:
            return None
        try:
            ready = {each.request_id: each for each in self.running}
            ready |= {each.request_id: each for each in self.waiting if self._handle_blocked_waiting_request(each)}
            return self._seat.orders(ready)
        except Exception:
            self._leave()
            return None

    def _leave(self) -> None:
        log.exception("the planner failed: vLLM's own policy goes on without it")
        self._seat = None

    def _carry_out(self, orders: Orders) -> None:
        """Drop whose KV goes, and bring both queues into the order of the plan."""
        rank = {name: index for index, name in enumerate(orders.tokens)}
        for request in [each for each in self.running if each.request_id in orders.evicted]:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
        self.running.sort(key=lambda each: rank.get(each.request_id, UNBOUNDED))
        queue = sorted(self.waiting, key=lambda each: rank.get(each.request_id, UNBOUNDED))
        self.waiting.clear()
        self.waiting.extend(queue)


def _check(config: Any, kv_groups: int) -> None:
    wrong = {
        "--async-scheduling": config.scheduler_config.async_scheduling,
        "--pipeline-parallel-size": config.parallel_config.pipeline_parallel_size > 1,
        "--speculative-config": config.speculative_config is not None,
        "--kv-transfer-config": config.kv_transfer_config is not None,
        "a model with several kinds of KV cache": kv_groups != 1,
    }
    for name, is_on in wrong.items():
        if is_on:
            raise ValueError(f"SloScheduler cannot be used with {name}")


def _compile(capabilities: Capabilities) -> None:
    """Plan once for nobody, so that the first request does not wait for the compiler."""
    scheduler = Scheduler(capabilities, UNMEASURED)
    scheduler.add(Request("nobody", 0.0, 2, (Stage(2, Slo(1.0, 1.0)),)), 0.0)
    scheduler.plan(0.0)
    scheduler.report(StepReport(0.0, 0.01, (Advance("nobody", 2, 1),)))
