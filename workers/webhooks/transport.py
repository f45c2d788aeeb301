"""Transport of webhooks: one POST to a checked address, within one deadline, reading little.

The name is resolved once, and rejected if the policy forbids any of its addresses. The connection
goes to a checked address, and its peer is checked again. SNI, `Host` and certificate are those of
the URL. No connection is reused, no redirect followed, no body decompressed, no proxy used.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final

import httpcore2

from darkroom.webhooks.deliveries import AttemptOutcome
from darkroom.webhooks.url_policy import (
    UrlNotAllowed,
    UrlPolicy,
    VettedUrl,
    check_address,
    check_url,
    is_address,
)
from workers.webhooks.resolver import NoAddress, Resolver

MAX_RESPONSE_BYTES: Final = 128 * 2**10  #: of a whole response with its headers
_MAX_BODY_BYTES: Final = 64 * 2**10
_BODY_S: Final = 2.0  #: for the body: the status has decided already
_CONNECT_S: Final = 5.0  #: to one address, so that the next one can be tried
_MAX_ADDRESSES: Final = 4
_OVERLOADED: Final = frozenset({429, 503})


@dataclass(frozen=True)
class WebhookResponse:
    """Outcome of a POST, and the receiver's `Retry-After`."""

    outcome: AttemptOutcome
    retry_after_s: float | None = None
    overloaded: bool = False  #: then `retry_after_s` holds for the whole destination


class ResponseTooLarge(Exception):
    """The response is larger than MAX_RESPONSE_BYTES."""


class WebhookTransport:
    """Transport with a URL policy; it keeps no connection open between POSTs."""

    def __init__(
        self, policy: UrlPolicy, resolver: Resolver, *, tls: ssl.SSLContext, timeout_s: float
    ) -> None:
        self._policy = policy
        self._backend = VettedBackend(policy, resolver)
        self._tls = tls
        self._timeout_s = timeout_s

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> WebhookResponse:
        """POST once and return the outcome; every failure is an outcome."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._post(check_url(url, self._policy), body, headers)
        except UrlNotAllowed:
            return WebhookResponse(AttemptOutcome.BLOCKED)
        except TimeoutError:
            return WebhookResponse(AttemptOutcome.TIMEOUT)
        except (ResponseTooLarge, httpcore2.ProtocolError):
            return WebhookResponse(AttemptOutcome.INVALID_RESPONSE)
        except (NoAddress, httpcore2.NetworkError, httpcore2.TimeoutException, OSError) as error:
            return WebhookResponse(
                AttemptOutcome.TLS if _is_tls(error) else AttemptOutcome.UNREACHABLE
            )

    async def _post(
        self, vetted: VettedUrl, body: bytes, headers: Mapping[str, str]
    ) -> WebhookResponse:
        url = httpcore2.URL(
            scheme=vetted.scheme, host=vetted.host, port=vetted.port, target=vetted.path
        )
        request = httpcore2.Request(
            "POST", url, headers=_headers(vetted, body, headers), content=body
        )
        connection = httpcore2.AsyncHTTPConnection(
            url.origin, ssl_context=self._tls, network_backend=self._backend
        )
        try:
            response = await connection.handle_async_request(request)
            await _drain_body(response)
            return classify_response(response.status, dict(response.headers))
        finally:
            await connection.aclose()


async def _drain_body(response: httpcore2.Response) -> None:
    """Read a short body to its end, so that the receiver sees no reset; abandon a long one."""
    read = 0
    with contextlib.suppress(
        TimeoutError, ResponseTooLarge, httpcore2.NetworkError, httpcore2.ProtocolError
    ):
        async with asyncio.timeout(_BODY_S):
            async for chunk in response.aiter_stream():
                read += len(chunk)
                if read > _MAX_BODY_BYTES:
                    return


def classify_response(status: int, headers: Mapping[bytes, bytes]) -> WebhookResponse:
    """Return the outcome of a status: only 2xx is success; a redirect is a failure."""
    if status == 410:  # noqa: PLR2004  # Gone
        return WebhookResponse(AttemptOutcome.HTTP_410)
    by_class = {
        2: AttemptOutcome.HTTP_2XX,
        3: AttemptOutcome.HTTP_3XX,
        4: AttemptOutcome.HTTP_4XX,
        5: AttemptOutcome.HTTP_5XX,
    }
    lowered = {name.lower(): value for name, value in headers.items()}
    retry_after_s = _retry_after_s(lowered.get(b"retry-after", b"").decode("latin-1"))
    outcome = by_class.get(status // 100, AttemptOutcome.INVALID_RESPONSE)
    return WebhookResponse(outcome, retry_after_s, status in _OVERLOADED)


def _retry_after_s(text: str) -> float | None:
    """Parse `Retry-After`: seconds or a date (RFC 9110); None if it is neither, or past."""
    if text.isascii() and text.isdigit() and len(text) < 10:  # noqa: PLR2004  # 30 years
        return float(text)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return seconds if seconds > 0 else None


def _headers(
    vetted: VettedUrl, body: bytes, headers: Mapping[str, str]
) -> dict[bytes | str, bytes | str]:
    is_default_port = {"https": 443, "http": 80}[vetted.scheme] == vetted.port
    host = f"[{vetted.host}]" if ":" in vetted.host else vetted.host
    merged: dict[bytes | str, bytes | str] = {
        "Host": host if is_default_port else f"{host}:{vetted.port}",
        "User-Agent": "Darkroom-Webhooks/1",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    merged.update(headers)
    return merged


def _is_tls(error: BaseException | None) -> bool:
    """Return whether a TLS error is the error or among its causes."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


class VettedBackend(httpcore2.AsyncNetworkBackend):
    """Network backend of httpcore2 that connects to checked addresses only."""

    def __init__(self, policy: UrlPolicy, resolver: Resolver) -> None:
        self._policy = policy
        self._resolver = resolver
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109  # the caller's deadline holds
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first address that answers. Raise UrlNotAllowed if any is forbidden."""
        addresses = await self._checked_addresses(host)
        failure: Exception = NoAddress(host)
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                return await self._connect(address, port)
            except (httpcore2.NetworkError, httpcore2.TimeoutException) as error:
                failure = error
        raise failure

    async def _checked_addresses(self, host: str) -> list[str]:
        found = [host] if is_address(host) else await self._resolver.addresses(host)
        return [str(check_address(address, self._policy)) for address in found]

    async def _connect(self, address: str, port: int) -> httpcore2.AsyncNetworkStream:
        stream = await self._inner.connect_tcp(address, port, timeout=_CONNECT_S)
        try:
            peer = stream.get_extra_info("server_addr")
            check_address(str(peer[0]), self._policy)  # the actual peer, not the intended one
        except BaseException:
            await stream.aclose()
            raise
        return LimitedStream(stream, MAX_RESPONSE_BYTES)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore2.AsyncNetworkStream:
        """Refuse: webhooks go to TCP addresses only."""
        raise UrlNotAllowed(f"{path} is a Unix socket, which webhooks may not use")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class LimitedStream(httpcore2.AsyncNetworkStream):
    """Stream that fails once it has read its budget of headers, 1xx responses and body."""

    def __init__(self, inner: httpcore2.AsyncNetworkStream, budget: int) -> None:
        self._inner = inner
        self._remaining = budget

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        if self._remaining <= 0:
            raise ResponseTooLarge
        read = await self._inner.read(min(max_bytes, self._remaining, 16 * 2**10), timeout)
        self._remaining -= len(read)
        return read

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore2.AsyncNetworkStream:
        try:
            inner = await self._inner.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:  # a deadline too: httpcore2 closes for its own exceptions only
            await self._inner.aclose()
            raise
        return LimitedStream(inner, self._remaining)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Trust the system's authorities and those in the file. Raise OSError."""
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context
