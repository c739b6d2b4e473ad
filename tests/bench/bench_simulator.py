"""How many times faster than real time an hour of chat is simulated, production planner inside, on one core.

    python tests/bench/bench_simulator.py [--rate 3.0] [--policy slos_serve]

The arrivals are the Azure chat trace's with ShareGPT's lengths, thinned or superposed to the rate; the time
model is Llama-3-8B on an A100. Drawing the requests and judging the outcome count, compiling does not.
"""

from __future__ import annotations

import argparse
import time

from slos_serve.loadtest import capacity, examine
from slos_serve.loadtest.cells import draw

HOUR = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rate", type=float, default=3.0, help="sessions per second")
    parser.add_argument("--policy", default="slos_serve")
    args = parser.parse_args()
    cell = examine.Cell("chatbot", "azure_chat", "a100-llama-3-8b", args.policy, 1, 0)
    scene = examine.scene(cell)
    scene.evaluate(cell.examined().sweep[0], 0.05)  # compiles
    started = time.process_time()
    arrivals = draw(cell.load, args.rate, 1.0, HOUR, cell.seed)
    firsts, seconds, dropped = scene._turns(arrivals, HOUR)
    played = scene.play(cell.examined().sweep[0], firsts)
    result = capacity.score(firsts, played, rate=args.rate, seconds=seconds, dropped=dropped)
    spent = time.process_time() - started
    print(
        f"{result.sessions} sessions of {HOUR:.0f} s in {spent:.2f} s of CPU: {HOUR / spent:.0f} times real time, "
        f"{100 * result.attainment['strict']:.1f} % attained"
    )


if __name__ == "__main__":
    main()
