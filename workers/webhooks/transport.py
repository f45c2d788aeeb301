"""One POST to a stranger's URL: to a vetted address, within one deadline, reading little.

The name is resolved once; if any of its addresses may not be called the name is not; the
connection is made to a vetted address and its peer is checked. Name, SNI, `Host` and certificate
stay the URL's. Nothing is reused, followed, decompressed or taken from the environment.
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

MAX_RESPONSE_BYTES: Final = 128 * 2**10  #: of all that is read of an answer, its headers included
_MAX_BODY_BYTES: Final = 64 * 2**10
_BODY_S: Final = 2.0  #: the status has decided; the rest is read out of politeness
_CONNECT_S: Final = 5.0  #: to one address, so that the next one has its chance
_ADDRESSES_TRIED: Final = 4
_OVERLOADED: Final = frozenset({429, 503})


@dataclass(frozen=True)
class WebhookResponse:
    """What a receiver said, in a word, and when it wants to be asked again."""

    outcome: AttemptOutcome
    retry_after_s: float | None = None
    overloaded: bool = False  #: then the wish is meant for all that waits for it


class ResponseTooLarge(Exception):
    """The answer has no end."""


class WebhookTransport:
    """Sends POSTs. Holds no connection between them."""

    def __init__(
        self, policy: UrlPolicy, resolver: Resolver, *, tls: ssl.SSLContext, timeout_s: float
    ) -> None:
        self._policy = policy
        self._backend = VettedBackend(policy, resolver)
        self._tls = tls
        self._timeout_s = timeout_s

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> WebhookResponse:
        """How it went; every way in which it can go wrong is an outcome."""
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
        self, target: VettedUrl, body: bytes, headers: Mapping[str, str]
    ) -> WebhookResponse:
        url = httpcore2.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path
        )
        request = httpcore2.Request(
            "POST", url, headers=_headers(target, body, headers), content=body
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
    """Read a short body to its end, so that its sender is not cut off; leave a long one."""
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
    """Only 2xx is success; a redirect is a failure as any other."""
    if status == 410:  # noqa: PLR2004  # Gone
        return WebhookResponse(AttemptOutcome.HTTP_410)
    named = {
        2: AttemptOutcome.HTTP_2XX,
        3: AttemptOutcome.HTTP_3XX,
        4: AttemptOutcome.HTTP_4XX,
        5: AttemptOutcome.HTTP_5XX,
    }
    lowered = {name.lower(): value for name, value in headers.items()}
    wish = _retry_after_s(lowered.get(b"retry-after", b"").decode("latin-1"))
    return WebhookResponse(
        named.get(status // 100, AttemptOutcome.INVALID_RESPONSE), wish, status in _OVERLOADED
    )


def _retry_after_s(text: str) -> float | None:
    """Seconds, or a date (RFC 9110); what is neither, or is past, is no wish."""
    if text.isascii() and text.isdigit() and len(text) < 10:  # noqa: PLR2004  # 30 years
        return float(text)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return seconds if seconds > 0 else None


def _headers(
    target: VettedUrl, body: bytes, headers: Mapping[str, str]
) -> dict[bytes | str, bytes | str]:
    usual = {"https": 443, "http": 80}[target.scheme] == target.port
    host = _bracketed(target.host)
    named: dict[bytes | str, bytes | str] = {
        "Host": host if usual else f"{host}:{target.port}",
        "User-Agent": "Darkroom-Webhooks/1",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    named.update(headers)
    return named


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_tls(error: BaseException | None) -> bool:
    """Whether TLS is behind it, as far as its causes tell."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


class VettedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to vetted addresses and nowhere else; httpcore2 does the rest."""

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
        """To the first vetted address that answers. Raises Blocked if any is not to be called."""
        allowed = await self._vetted(host)
        failure: Exception = NoAddress(host)
        for address in allowed[:_ADDRESSES_TRIED]:
            try:
                return await self._connect(address, port)
            except (httpcore2.NetworkError, httpcore2.TimeoutException) as error:
                failure = error
        raise failure

    async def _vetted(self, host: str) -> list[str]:
        literal = is_address(host)
        found = [host] if literal else await self._resolver.addresses(host)
        return [str(check_address(address, self._policy)) for address in found]

    async def _connect(self, address: str, port: int) -> httpcore2.AsyncNetworkStream:
        stream = await self._inner.connect_tcp(address, port, timeout=_CONNECT_S)
        try:
            peer = stream.get_extra_info("server_addr")
            check_address(str(peer[0]), self._policy)  # where we are, not where we meant to go
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
        """Never."""
        raise UrlNotAllowed(f"{path} is a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class LimitedStream(httpcore2.AsyncNetworkStream):
    """A stream that ends by force once it brought more than it may: headers, 1xx answers, body."""

    def __init__(self, inner: httpcore2.AsyncNetworkStream, budget: int) -> None:
        self._inner = inner
        self._left = budget

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        if self._left <= 0:
            raise ResponseTooLarge
        read = await self._inner.read(min(max_bytes, self._left, 16 * 2**10), timeout)
        self._left -= len(read)
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
        return LimitedStream(inner, self._left)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """The system's authorities, and those in the file. Raises OSError."""
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context
