"""An ImageGenerator that has Ray Serve's replicas draw."""

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import grpc
import ray
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from darkroom.errors import GeneratorGone, GeneratorUnavailable, MicrobatchCrashed
from darkroom.params import GenerationParams
from workers.generator import Drawing, GenerateCall

_HANDOVER_S: Final = 1.0  # longer than the few ms in which a call reaches a live replica


class RayGenerator:
    """Ray Serve handles, one for each model's application.

    Replies come over gRPC and not as objects of Ray's store: there, a caller that freezes keeps
    the replica from answering anybody else.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._handles: dict[str, Any] = {}
        self._lock = threading.Lock()

    def connect(self) -> None:
        """See ImageGenerator."""
        connect_to_ray(self._address)

    def begin(self, microbatch: Sequence[GenerationParams]) -> GenerateCall:
        """See ImageGenerator."""
        try:
            handle = self._handle(microbatch[0].model)
            return _RayCall(handle.generate.remote(list(microbatch)))
        except (RayServeException, RayError, TimeoutError) as error:
            raise GeneratorUnavailable(f"could not reach the replica: {error}") from error

    def _handle(self, model: str) -> Any:
        with self._lock:
            if model not in self._handles:
                handle = serve.get_app_handle(model)
                self._handles[model] = handle.options(_by_reference=False)
            return self._handles[model]


class _RayCall:
    def __init__(self, response: Any) -> None:
        self._response = response
        self._begun = time.monotonic()

    def result(self, timeout_s: float) -> Sequence[Drawing]:
        try:
            drawings: Sequence[Drawing] = self._response.result(timeout_s=timeout_s)
        except RayTaskError as error:  # first: it also is of the class of what the replica raised
            if isinstance(error.cause, (GeneratorUnavailable, MicrobatchCrashed)):
                raise error.cause from error
            raise MicrobatchCrashed(f"the replica failed: {error.cause!r}") from error
        except TimeoutError as error:
            self.cancel()  # the timeout ends the waiting, not the drawing
            if "resolving" in str(error):  # what an old handle says of a new cluster, for ever
                raise GeneratorGone(str(error)) from error
            raise MicrobatchCrashed(f"not drawn within {timeout_s:.0f} s") from error
        except (ActorDiedError, ActorUnavailableError) as error:
            raise self._death(error) from error
        except (RayError, RayServeException, grpc.RpcError) as error:
            raise GeneratorUnavailable(f"{type(error).__name__}: {error}") from error
        return drawings

    def _death(self, error: RayError) -> GeneratorUnavailable | MicrobatchCrashed:
        """Dead before it can have begun, or in the course: only then our jobs are suspects."""
        if time.monotonic() - self._begun < _HANDOVER_S:
            return GeneratorUnavailable(f"the replica was dead already: {error}")
        return MicrobatchCrashed("the replica died")

    def cancel(self) -> None:
        self._response.cancel()


def connect_to_ray(address: str) -> None:
    """Make this process a driver of the cluster. Raises ConnectionError and its like at once."""
    ray.init(address=address, namespace="serve", log_to_driver=False, configure_logging=False)


def check_ray(address: str) -> None:
    """Raises OSError unless something listens at the cluster's address."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=2).close()
