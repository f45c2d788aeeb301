"""The sender of webhooks: claims what is due, sends it, writes down how it went. Asynchronous.

Two transactions for many deliveries, and none is open while a receiver is waited for.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final, Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from darkroom.db.connection import Sessions, is_unavailable
from darkroom.webhooks import deliveries, endpoints, payloads, signatures
from darkroom.webhooks.deliveries import AttemptOutcome, Claim, Result
from darkroom.webhooks.secret_box import SecretBox
from workers.webhooks.circuit_breaker import MAX_DEFER_S, DestinationLimiter
from workers.webhooks.transport import WebhookResponse

LEASE: Final = timedelta(seconds=120)
_BEGIN_WITHIN_S: Final = 60.0  #: of its claim; later, the lease might end before the answer
_CLAIMED_AT_ONCE: Final = 500
_SETTLED_AT_ONCE: Final = 500
_POLL_S: Final = 1.0  #: when nobody rings
#: What comes within it shares a transaction: one for each webhook would cost more than the webhook.
_GATHER_S: Final = 0.02
_PAUSE_S: Final = 1.0  #: before the database is asked again that could not be reached
_UNSEALED_WAIT_S: Final = 60.0

Kept = TypeVar("Kept")
logger = logging.getLogger(__name__)


class Post(Protocol):
    """Sends one body; never raises for what a receiver does."""

    async def __call__(
        self, url: str, body: bytes, headers: Mapping[str, str]
    ) -> WebhookResponse: ...


@dataclass(frozen=True)
class OutgoingWebhook:
    """A claimed delivery, ready to go."""

    claim: Claim
    body: bytes
    secrets: Sequence[str]
    begin_by: float  #: by the monotonic clock


class Sender:
    """One event loop's worth of deliveries."""

    def __init__(
        self,
        sessions: Sessions,
        post: Post,
        gate: DestinationLimiter,
        *,
        seal: SecretBox,
        private: Sequence[Ed25519PrivateKey] = (),
    ) -> None:
        self._sessions = sessions
        self._post = post
        self._gate = gate
        self._seal = seal
        self._private = private
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="deliveries")
        self._woken = asyncio.Event()
        self._stopping = asyncio.Event()
        self._results: asyncio.Queue[Result] = asyncio.Queue()
        self._sending: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """There is something due. From the loop's own thread."""
        self._woken.set()

    def stop(self) -> None:
        """Finish what is in flight, hand back the rest. From the loop's own thread."""
        self._stopping.set()
        self._woken.set()

    async def run(self) -> None:
        """Until stopped. Raises what no retry helps against: then the process should end."""
        settling = asyncio.create_task(self._settle_all())
        claiming = asyncio.create_task(self._claim_all())
        await asyncio.wait({settling, claiming}, return_when=asyncio.FIRST_COMPLETED)
        if claiming.done():
            claiming.result()
            await asyncio.gather(*self._sending)
            await self._results.join()
        settling.cancel()
        await asyncio.wait({settling})
        if not settling.cancelled():
            settling.result()
        self._threads.shutdown()

    async def _claim_all(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            limit = min(self._gate.room, _CLAIMED_AT_ONCE)
            due = await self._claim(limit) if limit > 0 else 0
            if due < limit or limit <= 0:  # a whole claim: there may be more
                await asyncio.sleep(_GATHER_S)
                await _until(self._woken, _POLL_S - _GATHER_S)

    async def _claim(self, limit: int) -> int:
        letters, due = await self._patiently(lambda: self._open_mail(limit))
        for letter in letters:
            task = asyncio.create_task(self._send(letter))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return due

    def _open_mail(self, limit: int) -> tuple[list[OutgoingWebhook], int]:
        """Claim, and all that the letters need, in one transaction."""
        admitted: list[Claim] = []

        def admit(claim: Claim) -> float | None:
            wait_s = self._gate.admit(claim)
            if wait_s is None:
                admitted.append(claim)
            return wait_s

        try:
            with self._sessions.begin() as session:
                claims, due = deliveries.claim(session, limit=limit, lease=LEASE, admit=admit)
                letters = self._letters(session, claims)
        except BaseException:
            for claim in admitted:
                self._gate.leave(claim)
            raise
        ready = {letter.claim.id for letter in letters}
        for claim in claims:
            if claim.id not in ready:
                self._gate.leave(claim)
        return letters, due

    def _letters(self, session: Session, claims: Sequence[Claim]) -> list[OutgoingWebhook]:
        """Those that can be sent. What they are about may be gone, or a seal not be ours."""
        secrets = endpoints.secrets_of(
            session,
            endpoint_ids={claim.endpoint_id for claim in claims if claim.endpoint_id},
            tenant_ids={claim.tenant_id for claim in claims if not claim.endpoint_id},
            seal=self._seal,
        )
        signed: list[Claim] = []
        unsigned: list[Claim] = []
        for claim in claims:
            known = (claim.endpoint_id or claim.tenant_id) in secrets
            (signed if known else unsigned).append(claim)
        if unsigned:
            deliveries.release(session, unsigned, wait_s=_UNSEALED_WAIT_S)
        bodies = payloads.bodies(session, signed)
        gone = [claim for claim in signed if claim.id not in bodies]
        deliveries.settle(session, [Result(claim, AttemptOutcome.DROPPED) for claim in gone])
        begin_by = time.monotonic() + _BEGIN_WITHIN_S
        return [
            OutgoingWebhook(
                claim, bodies[claim.id], secrets[claim.endpoint_id or claim.tenant_id], begin_by
            )
            for claim in signed
            if claim.id in bodies
        ]

    async def _send(self, letter: OutgoingWebhook) -> None:
        claim = letter.claim
        try:
            async with self._gate.turns(claim):
                if self._stopping.is_set() or time.monotonic() > letter.begin_by:
                    await self._hand_back(claim)
                    return
                began = time.monotonic()
                answer = await self._post(claim.url, letter.body, self._signed(letter))
                vouched = self._gate.learn(
                    claim,
                    answer.outcome,
                    time.monotonic() - began,
                    rest_s=answer.retry_after_s if answer.overloaded else None,
                )
            self._results.put_nowait(Result(claim, answer.outcome, answer.retry_after_s))
            if vouched:
                await self._patiently(partial(self._hasten, claim))
        finally:
            self._gate.leave(claim)
            self._woken.set()

    def _signed(self, letter: OutgoingWebhook) -> dict[str, str]:
        return signatures.headers(
            letter.claim.message_id,
            int(time.time()),
            letter.body,
            shared=letter.secrets,
            private=self._private,
        )

    async def _hand_back(self, claim: Claim) -> None:
        def put_back() -> None:
            with self._sessions.begin() as session:
                deliveries.release(session, [claim])

        await self._patiently(put_back)

    def _hasten(self, claim: Claim) -> None:
        with self._sessions.begin() as session:
            deliveries.make_due_now(session, claim, within=timedelta(seconds=MAX_DEFER_S))

    async def _settle_all(self) -> None:
        while True:
            results = [await self._results.get()]
            await asyncio.sleep(_GATHER_S)
            while len(results) < _SETTLED_AT_ONCE and not self._results.empty():
                results.append(self._results.get_nowait())
            await self._patiently(partial(self._settle, results))
            for _ in results:
                self._results.task_done()

    def _settle(self, results: Sequence[Result]) -> None:
        with self._sessions.begin() as session:
            ours = deliveries.settle(session, results)
        if ours < len(results):
            logger.warning("%d deliveries were fenced out: others sent them", len(results) - ours)

    async def _patiently(self, act: Callable[[], Kept]) -> Kept:
        """In a thread; while the database cannot be reached, again."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(self._threads, act)
            except (DBAPIError, PoolTimeout) as error:
                if isinstance(error, DBAPIError) and not is_unavailable(error):
                    raise
                logger.warning("the database cannot be reached, will try again: %s", error)
                await asyncio.sleep(_PAUSE_S)


async def _until(event: asyncio.Event, seconds: float) -> None:
    """Until the event, or the time has passed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
