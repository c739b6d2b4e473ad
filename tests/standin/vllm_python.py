"""Behaves like a Python that has vLLM, as far as `bench-vllm` can see: a completions server that makes up tokens.

vllm_python.py -c CODE                                      prints a version
vllm_python.py -m slos_serve.backend.random_model FOLDER    a folder
vllm_python.py -m vllm.entrypoints.openai.api_server ...    serves, with a child that outlives a plain kill
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from aiohttp import web

TOKENS_PER_SECOND = 200.0


async def complete(request: web.Request) -> web.StreamResponse:
    """As many tokens as asked for, all requests sharing one rate."""
    body = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    busy = request.app["busy"]
    for number in range(body["max_tokens"]):
        async with busy:
            await asyncio.sleep(1 / TOKENS_PER_SECOND)
        end = "length" if number + 1 == body["max_tokens"] else None
        choice = {"index": 0, "text": "x", "token_ids": [7], "finish_reason": end}
        await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        print("0.0")
    elif arguments[1] == "slos_serve.backend.random_model":
        Path(arguments[2]).mkdir(parents=True, exist_ok=True)
    else:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", *arguments, flush=True)
        app = web.Application()
        app["busy"] = asyncio.Semaphore(4)
        app.router.add_post("/v1/completions", complete)
        app.router.add_get("/health", health)
        web.run_app(app, host="127.0.0.1", port=int(arguments[arguments.index("--port") + 1]), print=None)


if __name__ == "__main__":
    main(sys.argv[1:])
