"""Webhook sender: claims due deliveries, sends them, and stores the results, on one event loop.

A transaction claims or settles many deliveries, and none is open while a receiver answers.
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
_START_WITHIN_S: Final = 60.0  #: of the claim; later, the lease might lapse before the answer
_MAX_CLAIMED: Final = 500  #: in one transaction
_MAX_SETTLED: Final = 500  #: in one transaction
_POLL_S: Final = 1.0  #: between claims without a wake-up
#: Events within it share a transaction: one for each webhook would cost more than the webhook.
_BATCH_WINDOW_S: Final = 0.02
_RETRY_S: Final = 1.0  #: between attempts to reach the database
_NO_SECRET_WAIT_S: Final = 60.0

Returned = TypeVar("Returned")
logger = logging.getLogger(__name__)


class Post(Protocol):
    """Sends one body; never raises for what a receiver does."""

    async def __call__(
        self, url: str, body: bytes, headers: Mapping[str, str]
    ) -> WebhookResponse: ...


@dataclass(frozen=True)
class OutgoingWebhook:
    """Claimed delivery with its body and its secrets."""

    claim: Claim
    body: bytes
    secrets: Sequence[str]
    start_by: float  #: on the monotonic clock


class Sender:
    """Sender of the deliveries of one event loop."""

    def __init__(
        self,
        sessions: Sessions,
        post: Post,
        limiter: DestinationLimiter,
        *,
        secret_box: SecretBox,
        private_keys: Sequence[Ed25519PrivateKey] = (),
    ) -> None:
        self._sessions = sessions
        self._post = post
        self._limiter = limiter
        self._secret_box = secret_box
        self._private_keys = private_keys
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="deliveries")
        self._woken = asyncio.Event()
        self._stopping = asyncio.Event()
        self._results: asyncio.Queue[Result] = asyncio.Queue()
        self._sending: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Claim soon. Call it in the loop's own thread."""
        self._woken.set()

    def stop(self) -> None:
        """Finish the attempts in flight and release the rest. Call it in the loop's own thread."""
        self._stopping.set()
        self._woken.set()

    async def run(self) -> None:
        """Send until stopped. Raise what no retry helps against: then the process should exit."""
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
            limit = min(self._limiter.available, _MAX_CLAIMED)
            due = await self._start_due(limit) if limit > 0 else 0
            if due < limit or limit <= 0:  # after a full claim there may be more
                await asyncio.sleep(_BATCH_WINDOW_S)
                await _wait_for(self._woken, _POLL_S - _BATCH_WINDOW_S)

    async def _start_due(self, limit: int) -> int:
        """Start to send up to `limit` due deliveries; return how many were due."""
        webhooks, due = await self._with_retries(partial(self._claim, limit))
        for webhook in webhooks:
            task = asyncio.create_task(self._send(webhook))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return due

    def _claim(self, limit: int) -> tuple[list[OutgoingWebhook], int]:
        """Claim due deliveries and read all that they need, in one transaction."""
        acquired: list[Claim] = []

        def admit(claim: Claim) -> float | None:
            wait_s = self._limiter.acquire(claim)
            if wait_s is None:
                acquired.append(claim)
            return wait_s

        try:
            with self._sessions.begin() as session:
                claims, due = deliveries.claim(session, limit=limit, lease=LEASE, admit=admit)
                webhooks = self._render(session, claims)
        except BaseException:
            for claim in acquired:
                self._limiter.release(claim)
            raise
        ready = {webhook.claim.id for webhook in webhooks}
        for claim in claims:
            if claim.id not in ready:
                self._limiter.release(claim)
        return webhooks, due

    def _render(self, session: Session, claims: Sequence[Claim]) -> list[OutgoingWebhook]:
        """Render the claims; release those without a secret, drop those without a subject."""
        secrets = endpoints.signing_secrets(
            session,
            endpoint_ids={claim.endpoint_id for claim in claims if claim.endpoint_id},
            tenant_ids={claim.tenant_id for claim in claims if not claim.endpoint_id},
            secret_box=self._secret_box,
        )
        signable = [claim for claim in claims if _secret_owner(claim) in secrets]
        if len(signable) < len(claims):
            unsigned = [claim for claim in claims if _secret_owner(claim) not in secrets]
            deliveries.release(session, unsigned, wait_s=_NO_SECRET_WAIT_S)
        bodies = payloads.bodies(session, signable)
        dropped = [claim for claim in signable if claim.id not in bodies]
        deliveries.settle(session, [Result(claim, AttemptOutcome.DROPPED) for claim in dropped])
        start_by = time.monotonic() + _START_WITHIN_S
        return [
            OutgoingWebhook(claim, bodies[claim.id], secrets[_secret_owner(claim)], start_by)
            for claim in signable
            if claim.id in bodies
        ]

    async def _send(self, webhook: OutgoingWebhook) -> None:
        claim = webhook.claim
        try:
            async with self._limiter.slots(claim):
                if self._stopping.is_set() or time.monotonic() > webhook.start_by:
                    await self._with_retries(partial(self._release, claim))
                    return
                response, recovered = await self._attempt(webhook)
            self._results.put_nowait(Result(claim, response.outcome, response.retry_after_s))
            if recovered:
                await self._with_retries(partial(self._make_due_now, claim))
        finally:
            self._limiter.release(claim)
            self._woken.set()

    async def _attempt(self, webhook: OutgoingWebhook) -> tuple[WebhookResponse, bool]:
        """POST once; return the response and whether its destination has recovered."""
        claim = webhook.claim
        started = time.monotonic()
        response = await self._post(claim.url, webhook.body, self._headers(webhook))
        recovered = self._limiter.record_result(
            claim,
            response.outcome,
            time.monotonic() - started,
            retry_after_s=response.retry_after_s if response.overloaded else None,
        )
        return response, recovered

    def _headers(self, webhook: OutgoingWebhook) -> dict[str, str]:
        return signatures.headers(
            webhook.claim.message_id,
            int(time.time()),
            webhook.body,
            shared=webhook.secrets,
            private=self._private_keys,
        )

    def _release(self, claim: Claim) -> None:
        with self._sessions.begin() as session:
            deliveries.release(session, [claim])

    def _make_due_now(self, claim: Claim) -> None:
        with self._sessions.begin() as session:
            deliveries.make_due_now(session, claim, within=timedelta(seconds=MAX_DEFER_S))

    async def _settle_all(self) -> None:
        while True:
            results = [await self._results.get()]
            await asyncio.sleep(_BATCH_WINDOW_S)
            while len(results) < _MAX_SETTLED and not self._results.empty():
                results.append(self._results.get_nowait())
            await self._with_retries(partial(self._settle, results))
            for _ in results:
                self._results.task_done()

    def _settle(self, results: Sequence[Result]) -> None:
        with self._sessions.begin() as session:
            settled = deliveries.settle(session, results)
        if settled < len(results):
            logger.warning(
                "discarded %d of %d results: their leases lapsed and another sender took over",
                len(results) - settled,
                len(results),
            )

    async def _with_retries(self, work: Callable[[], Returned]) -> Returned:
        """Run `work` in a thread, again and again while the database is unavailable."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(self._threads, work)
            except (DBAPIError, PoolTimeout) as error:
                if isinstance(error, DBAPIError) and not is_unavailable(error):
                    raise
                logger.warning("database unavailable: %s; retrying in %.0f s", error, _RETRY_S)
                await asyncio.sleep(_RETRY_S)


def _secret_owner(claim: Claim) -> str:
    return claim.endpoint_id or claim.tenant_id


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
