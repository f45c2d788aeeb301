"""A Triton model that sleeps, for tests of hosts: it loads in a moment."""

from pathlib import Path

CONFIG = """
name: "sleep"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "seconds" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "slept" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
MODEL = """
import os, pathlib, time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for seconds in pb.get_input_tensor_by_name(request, "seconds").as_numpy():
                if seconds < 0:
                    raise ValueError("seconds must not be negative")
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    time.sleep(0.01)
                    if sender.is_cancelled():
                        pathlib.Path(os.environ["CANCELED_FILE"]).touch()
                        break
                slept = pb.Tensor("slept", np.array([seconds], np.float32))
                sender.send(pb.InferenceResponse(output_tensors=[slept]))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def write_sleeping_model(repository: Path) -> Path:
    """Write the model `sleep` into a repository, and return the repository."""
    folder = repository / "sleep"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "1" / "model.py").write_text(MODEL)
    return repository
