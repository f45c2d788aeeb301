"""An ImageGenerator that has Ray Serve's replicas draw."""

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
_STARTED_WITHIN_S: Final = 300.0  # a replica that is not there before there is work for it
_WITHDRAWN_WITHIN_S: Final = 2.0  # 5 ms measured; a frozen replica does not answer


class RayGenerator:
    """Ray Serve handles, one for each model's application.

    Replies come as a stream over gRPC, and not as objects of Ray's store: there, a caller that
    freezes keeps the replica from answering anybody else.
    """

    def __init__(
        self,
        address: str,
        *,
        on_demand: Collection[str] = (),
        application: Callable[[str], str] | None = None,
    ) -> None:
        """`on_demand`: the models that have no replica until there is work for one.

        `application`: the name of the one that draws for a model; else as
        `workers.ray_cluster.routing` says.
        """
        self._address = address
        self._application = application or RoutingCache()
        self._on_demand = frozenset(on_demand)
        self._handles: dict[str, Any] = {}
        self._lock = threading.Lock()

    def connect(self) -> None:
        """See ImageGenerator."""
        connect_to_ray(self._address)

    def begin(self, microbatch: Sequence[GenerationParams], *, alone: bool = False) -> GenerateCall:
        """See ImageGenerator."""
        model = microbatch[0].model
        patience_s = _STARTED_WITHIN_S if model in self._on_demand else _ACCEPTED_WITHIN_S
        try:
            handle = self._handle(model)
            return _RayCall(handle, microbatch, alone=alone, accepted_within_s=patience_s)
        except (RayServeException, RayError, TimeoutError) as error:
            raise GeneratorUnavailable(f"could not reach the replica: {error}") from error

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
        accepted_within_s: float,
    ) -> None:
        self._handle = handle
        self._accepted_within_s = accepted_within_s
        self._call_id = uuid4().hex
        self._response = handle.options(stream=True).generate.remote(
            self._call_id, list(microbatch), alone=alone
        )
        self._stage: Accepted | Started | None = None
        self._canceled = False

    def happenings(self, *, timeout_s: float, step_timeout_s: float) -> Iterator[GenerationEvent]:
        deadline = time.monotonic() + timeout_s
        patience_s = self._accepted_within_s
        with asyncio.Runner() as runner:  # Ray's own iteration knows no timeout
            while happening := self._next(runner, min(patience_s, deadline - time.monotonic())):
                match happening:
                    case Accepted():
                        self._stage, patience_s = happening, timeout_s
                    case Started():
                        self._stage, patience_s = happening, step_timeout_s
                        deadline = time.monotonic() + timeout_s
                yield happening

    def _next(self, runner: asyncio.Runner, patience_s: float) -> GenerationEvent | None:
        """None when that was all."""
        try:
            happening: GenerationEvent | None = runner.run(self._awaited(patience_s))
        except (GeneratorUnavailable, MicrobatchCrashed):  # in the replica's own words
            raise
        except TimeoutError as error:
            self._response.cancel()  # the timeout ends the waiting, not the drawing
            raise self._overdue(patience_s) from error
        except (asyncio.CancelledError, Exception) as error:
            raise self._translated(error) from error
        return happening

    async def _awaited(self, patience_s: float) -> GenerationEvent | None:
        async with asyncio.timeout(patience_s):
            happening: GenerationEvent | None = await anext(self._response, None)
        return happening

    def _overdue(self, waited_s: float) -> GeneratorUnavailable | MicrobatchCrashed:
        match self._stage:
            case None:  # what an old handle says of a new cluster, for ever
                return GeneratorGone(f"no replica took it within {waited_s:.0f} s")
            case Accepted():
                return GeneratorUnavailable(f"its turn did not come within {waited_s:.0f} s")
            case Started():
                return MicrobatchCrashed(f"the replica said nothing for {waited_s:.0f} s")

    def _translated(self, error: BaseException) -> DarkroomError:
        match error:
            case RequestCancelledError() | asyncio.CancelledError() if self._canceled:
                return MicrobatchCanceled()
            case ActorDiedError() | ActorUnavailableError() if isinstance(self._stage, Started):
                return MicrobatchCrashed("the replica died")
            case RayTaskError():  # a RayError, but of what runs there
                return MicrobatchCrashed(f"the replica failed: {error.cause!r}")
            case RayError() | RayServeException() | grpc.RpcError() | asyncio.CancelledError():
                return GeneratorUnavailable(f"{type(error).__name__}: {error}")
            case _:
                return MicrobatchCrashed(f"the replica failed: {error!r}")

    def withdraw(self, indices: Collection[int]) -> None:
        # To all replicas, because nobody says which one has it.
        told = self._handle.broadcast("cancel_rows", self._call_id, sorted(indices))
        with contextlib.suppress(RayServeException, RayError, TimeoutError):
            told.results(timeout_s=_WITHDRAWN_WITHIN_S, return_exceptions=True)

    def cancel(self) -> None:
        self._canceled = True
        self._response.cancel()
