"""Hosts Triton behind one small interface: inside this process, or as a child over a socket."""

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
    patience: TritonTimeouts = TritonTimeouts(),  # noqa: B008  # frozen
) -> ModelHost:
    """A host that is not started yet. `env` is added to the environment of the models.

    "auto" is in process where `import tritonserver` works. Raises SetupError, saying what to
    install.
    """
    if kind == "inprocess" or (kind == "auto" and has_tritonserver()):
        return InProcessHost(repository, env, patience=patience)
    return SubprocessHost(repository, env, patience=patience)
