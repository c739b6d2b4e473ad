"""A Triton model that answers exactly what its prompt says, to show clients what a server should never do.

The prompt is JSON: `responses`, a list of outputs by name; then an `error` text if given; `final` false
leaves the stream open; `delay` seconds go before each response. The prompt "cancelled" is answered with the
number of requests whose caller went away.
"""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from slos_serve.client import wire

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        for field in wire.INPUTS:
            config.add_input({**tensor(field), "optional": True})
        for field in wire.OUTPUTS:
            config.add_output(tensor(field))
        return config

    def initialize(self, args):
        self.cancelled = 0

    def execute(self, requests):
        for request in requests:
            prompt = wire.text(pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy())
            if prompt == "cancelled":
                text = str(self.cancelled)
                prompt = json.dumps({"responses": [{"text_output": text, "token_index": 0, "finish_reason": "stop"}]})
            threading.Thread(target=self.answer, args=(request.get_response_sender(), json.loads(prompt))).start()

    def answer(self, sender, script):
        for outputs in script["responses"]:
            time.sleep(script.get("delay", 0.0))
            if sender.is_cancelled():
                self.cancelled += 1
                sender.send(flags=FINAL)
                return
            sender.send(pb_utils.InferenceResponse([array(*output) for output in outputs.items()]))
        if "error" in script:
            error = pb_utils.TritonError(script["error"], pb_utils.TritonError.INVALID_ARG)
            sender.send(pb_utils.InferenceResponse(error=error), FINAL)
        elif script.get("final", True):
            sender.send(flags=FINAL)
        else:
            self.kept = sender


def tensor(field):
    kind = "STRING" if field.dtype == "BYTES" else field.dtype
    return {"name": field.name, "data_type": f"TYPE_{kind}", "dims": list(field.dims)}


def array(name, value):
    values = value if isinstance(value, list) else [value]
    if isinstance(value, str):
        return pb_utils.Tensor(name, np.array([value.encode()], dtype=np.object_))
    return pb_utils.Tensor(name, np.array(values, dtype=np.int32))
