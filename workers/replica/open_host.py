"""Choice of the host: Triton inside this process, or as a child process over a socket."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from workers.replica.inprocess_host import InProcessHost
from workers.replica.model_host import ModelHost, TritonTimeouts
from workers.replica.subprocess_host import SubprocessHost
from workers.replica.triton_config import has_tritonserver


def open_host(
    kind: Literal["auto", "inprocess", "subprocess"],
    repository: Path,
    env: Mapping[str, str],
    *,
    timeouts: TritonTimeouts = TritonTimeouts(),  # noqa: B008  # frozen
) -> ModelHost:
    """Return a host that is not started yet. `env` is added to the models' environment.

    "auto" is in process where `import tritonserver` works. Raises SetupError, which names what to
    install.
    """
    if kind == "inprocess" or (kind == "auto" and has_tritonserver()):
        return InProcessHost(repository, env, timeouts=timeouts)
    return SubprocessHost(repository, env, timeouts=timeouts)
