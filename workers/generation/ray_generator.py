"""Image generator whose replicas run on Ray Serve."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final
from uuid import uuid4

import grpc
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from darkroom.errors import (
    DarkroomError,
    GeneratorGone,
    GeneratorUnavailable,
    MicrobatchCanceled,
    MicrobatchCrashed,
)
from darkroom.generation.params import GenerationParams
from workers.generation.generator import Accepted, GenerateCall, GenerationEvent, Started
from workers.ray_cluster.connection import connect_to_ray
from workers.ray_cluster.routing import RoutingCache

_ACCEPTED_WITHIN_S: Final = 60.0  # longer than a replica takes to be replaced
_STARTED_WITHIN_S: Final = 300.0  # where a model has no replica until there is work for it
_CANCELED_WITHIN_S: Final = 2.0  # 5 ms measured; a frozen replica does not answer


class RayGenerator:
    """Ray Serve handles, one for each model's application.

    Replies come as a stream over gRPC, and not as objects of Ray's store: there, a caller that
    freezes keeps the replica from answering any other.
    """

    def __init__(
        self,
        address: str,
        *,
        on_demand: Collection[str] = (),
        application: Callable[[str], str] | None = None,
    ) -> None:
        """Connect to nothing yet.

        `on_demand`: the models that have no replica until there is work for one.
        `application`: returns the name of a model's application; default: `RoutingCache`.
        """
        self._address = address
        self._application = application or RoutingCache()
        self._on_demand = frozenset(on_demand)
        self._handles: dict[str, Any] = {}
        self._lock = threading.Lock()

    def connect(self) -> None:
        connect_to_ray(self._address)

    def start(self, microbatch: Sequence[GenerationParams], *, alone: bool = False) -> GenerateCall:
        model = microbatch[0].model
        timeout_s = _STARTED_WITHIN_S if model in self._on_demand else _ACCEPTED_WITHIN_S
        try:
            handle = self._handle(model)
            return _RayCall(handle, microbatch, alone=alone, accept_timeout_s=timeout_s)
        except (RayServeException, RayError, TimeoutError) as error:
            raise GeneratorUnavailable(f"could not reach a replica: {error}") from error

    def _handle(self, model: str) -> Any:
        name = self._application(model)
        with self._lock:
            if name not in self._handles:
                handle = serve.get_app_handle(name)
                self._handles[name] = handle.options(_by_reference=False)
            return self._handles[name]


class _RayCall:
    def __init__(
        self,
        handle: Any,
        microbatch: Sequence[GenerationParams],
        *,
        alone: bool,
        accept_timeout_s: float,
    ) -> None:
        self._handle = handle
        self._accept_timeout_s = accept_timeout_s
        self._call_id = uuid4().hex
        self._response = handle.options(stream=True).generate.remote(
            self._call_id, list(microbatch), alone=alone
        )
        self._stage: Accepted | Started | None = None
        self._canceled = False

    def events(self, *, timeout_s: float, step_timeout_s: float) -> Iterator[GenerationEvent]:
        deadline = time.monotonic() + timeout_s
        next_timeout_s = self._accept_timeout_s
        with asyncio.Runner() as runner:  # Ray's own iteration has no timeout
            while event := self._next(runner, min(next_timeout_s, deadline - time.monotonic())):
                match event:
                    case Accepted():
                        self._stage, next_timeout_s = event, timeout_s
                    case Started():
                        self._stage, next_timeout_s = event, step_timeout_s
                        deadline = time.monotonic() + timeout_s
                yield event

    def _next(self, runner: asyncio.Runner, timeout_s: float) -> GenerationEvent | None:
        """Wait for the next event; return None after the last."""
        try:
            event: GenerationEvent | None = runner.run(self._receive(timeout_s))
        except (GeneratorUnavailable, MicrobatchCrashed):  # raised by the replica itself
            raise
        except TimeoutError as error:
            self._response.cancel()  # the timeout ends the wait, not the generation
            raise self._timed_out(timeout_s) from error
        except (asyncio.CancelledError, Exception) as error:
            raise self._translate(error) from error
        return event

    async def _receive(self, timeout_s: float) -> GenerationEvent | None:
        async with asyncio.timeout(timeout_s):
            event: GenerationEvent | None = await anext(self._response, None)
        return event

    def _timed_out(self, timeout_s: float) -> GeneratorUnavailable | MicrobatchCrashed:
        match self._stage:
            case None:  # what an old handle gets from a new cluster, for ever
                return GeneratorGone(f"no replica accepted the microbatch within {timeout_s:.0f} s")
            case Accepted():
                return GeneratorUnavailable(f"generation did not start within {timeout_s:.0f} s")
            case Started():
                return MicrobatchCrashed(f"the replica sent nothing for {timeout_s:.0f} s")

    def _translate(self, error: BaseException) -> DarkroomError:
        match error:
            case RequestCancelledError() | asyncio.CancelledError() if self._canceled:
                return MicrobatchCanceled()
            case ActorDiedError() | ActorUnavailableError() if isinstance(self._stage, Started):
                return MicrobatchCrashed("the replica died")
            case RayTaskError():  # a RayError, but of code in the replica
                return MicrobatchCrashed(f"the replica failed: {error.cause!r}")
            case RayError() | RayServeException() | grpc.RpcError() | asyncio.CancelledError():
                return GeneratorUnavailable(f"{type(error).__name__}: {error}")
            case _:
                return MicrobatchCrashed(f"the replica failed: {error!r}")

    def cancel_rows(self, indices: Collection[int]) -> None:
        # To all replicas, because Serve does not say which one has the call.
        responses = self._handle.broadcast("cancel_rows", self._call_id, sorted(indices))
        with contextlib.suppress(RayServeException, RayError, TimeoutError):
            responses.results(timeout_s=_CANCELED_WITHIN_S, return_exceptions=True)

    def cancel(self) -> None:
        self._canceled = True
        self._response.cancel()
