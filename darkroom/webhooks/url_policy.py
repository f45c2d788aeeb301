"""URL policy: which URLs and IP addresses webhooks may be sent to.

A URL is checked as text when it is registered (`check_url`), and at every attempt again, together
with each address that its host resolves to (`check_address`). `ipaddress.is_global` alone is not
enough: it lets NAT64, 6to4 and others pass.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, TypeAlias

import httpx2

from darkroom.errors import DarkroomError, SetupError
from darkroom.settings import Settings

Network: TypeAlias = IPv4Network | IPv6Network
Address: TypeAlias = IPv4Address | IPv6Address

MAX_URL_CHARS: Final = 2048
_NOT_A_URL: Final = "must be an absolute URL like https://host[:port]/path"
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


_NOT_PUBLIC: Final = _networks(
    "0.0.0.0/8",  # this host
    "10.0.0.0/8",
    "100.64.0.0/10",  # carriers' NAT; Alibaba's metadata
    "127.0.0.0/8",
    "168.63.129.16/32",  # Azure's host
    "169.254.0.0/16",  # link-local; the metadata of AWS, Azure, Google
    "172.16.0.0/12",
    "192.0.0.0/24",  # protocol assignments; Oracle's metadata
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",  # 6to4 relays
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    # Within 2000::/3; all other IPv6 addresses are rejected anyway.
    "2001::/23",  # Teredo, ORCHID and other protocols
    "2001:db8::/32",
    "2002::/16",  # 6to4: an IPv4 address in disguise
    "2620:4f:8000::/48",
    "3fff::/20",
)
_GLOBAL_V6: Final = IPv6Network("2000::/3")
#: Networks that `allow_private` allows: one's own machine and network, but no metadata service.
_PRIVATE: Final = _networks(
    "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"
)
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII | re.IGNORECASE)
_TOP_LABEL: Final = re.compile(r"[a-z]{2,63}|xn--[a-z0-9-]{1,59}", re.ASCII | re.IGNORECASE)
#: Top-level names of private networks; none is a public top-level domain.
_LOCAL_TOPS: Final = frozenset(
    (
        *("alt", "arpa", "cluster", "consul", "corp", "default", "docker", "domain", "home"),
        *("internal", "intranet", "invalid", "lan", "local", "localdomain", "localhost"),
        *("localnet", "mshome", "onion", "private", "svc", "test", "workgroup"),
    )
)
#: The part between `//` and the path: no user, and an optional port in ASCII digits.
_AUTHORITY: Final = re.compile(r"[^/?#]*//(\[[^]@]*\]|[^]:@/?#\[]+)(:[0-9]{1,5})?(?=[/?#]|$)")


class UrlNotAllowed(DarkroomError):
    """The policy forbids the URL, or an address that its host resolves to."""


@dataclass(frozen=True)
class UrlPolicy:
    """Rules for URLs. The default: https on public addresses, on ports 443 and 8443."""

    schemes: frozenset[str] = frozenset({"https"})
    ports: frozenset[int] | None = frozenset({443, 8443})  #: None: any
    private: bool = False  #: allow loopback, private networks and names without a dot too
    denied_networks: tuple[Network, ...] = ()  #: by the operator; stronger than all else
    denied_names: tuple[str, ...] = ()  #: the same, with their subdomains


def policy_of(settings: Settings) -> UrlPolicy:
    """Return the policy that the settings describe. Raise SetupError if they are invalid."""
    networks, names = _parse_denylist(settings.webhook_denylist)
    if settings.webhook_allow_private:
        both = frozenset(_DEFAULT_PORTS)
        return UrlPolicy(both, None, private=True, denied_networks=networks, denied_names=names)
    return UrlPolicy(denied_networks=networks, denied_names=names)


def _parse_denylist(text: str) -> tuple[tuple[Network, ...], tuple[str, ...]]:
    networks: list[Network] = []
    names: list[str] = []
    for entry in re.split(r"[\s,]+", text.strip()):
        try:
            networks.append(ipaddress.ip_network(entry))
        except ValueError as error:
            name = entry.removeprefix(".").lower()
            if entry and (not _is_name(name) or _TOP_LABEL.fullmatch(name.split(".")[-1]) is None):
                raise SetupError(
                    f"DARKROOM_WEBHOOK_DENYLIST: {entry!r} must be a network (203.0.113.0/24, its "
                    "host bits zero) or a domain name (example.com)"
                ) from error
            names += [name] if entry else []
    return tuple(networks), tuple(names)


def check_address(text: str, policy: UrlPolicy) -> Address:
    """Return the address, unwrapped if it is an IPv4-mapped one. Raise UrlNotAllowed."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise UrlNotAllowed("resolved to an invalid IP address") from error
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    allowed = policy.private and _in(address, _PRIVATE)
    if _in(address, policy.denied_networks) or not (allowed or _is_public(address)):
        raise UrlNotAllowed("must lead to a public IP address")
    return address


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and (address.scope_id or address not in _GLOBAL_V6):
        return False
    return address.is_global and not address.is_multicast and not _in(address, _NOT_PUBLIC)


def _in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


@dataclass(frozen=True)
class VettedUrl:
    """Checked URL in the parts that go on the wire; `host` is ASCII, without brackets."""

    scheme: str
    host: str
    port: int
    path: str  #: with its query; percent-encoded


def check_url(url: str, policy: UrlPolicy) -> VettedUrl:
    """Check all of a URL that needs no name server. Raise UrlNotAllowed with a public message.

    The URL is parsed only here: the transport connects to the parts that were checked.
    """
    parsed = _parse(url)
    if parsed.scheme not in policy.schemes:
        raise UrlNotAllowed(f"must start with {' or '.join(sorted(policy.schemes))}://")
    if parsed.userinfo:
        raise UrlNotAllowed("must not contain a user name or password")
    if not _AUTHORITY.match(url):
        raise UrlNotAllowed(_NOT_A_URL)
    port = _DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
    if port == 0 or (policy.ports is not None and port not in policy.ports):
        ports = " or ".join(map(str, sorted(policy.ports or {})))
        raise UrlNotAllowed(f"port must be {ports or 'between 1 and 65535'}")
    host = parsed.raw_host.decode("ascii").lower()
    _check_host(host, policy)
    return VettedUrl(parsed.scheme, host, port, parsed.raw_path.decode("ascii"))


def _parse(url: str) -> httpx2.URL:
    if len(url) > MAX_URL_CHARS:
        raise UrlNotAllowed(f"must be at most {MAX_URL_CHARS} characters long")
    if "\\" in url or any(character == " " or not character.isprintable() for character in url):
        raise UrlNotAllowed("must not contain spaces, backslashes or control characters")
    try:
        return httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise UrlNotAllowed(_NOT_A_URL) from error


def _check_host(host: str, policy: UrlPolicy) -> None:
    address = _parse_address(host)
    if address is not None:
        check_address(str(address), policy)
        return
    if not _is_name(host):
        raise UrlNotAllowed("host must be a DNS name")
    top = host.rsplit(".", maxsplit=1)[-1]
    if not policy.private and (
        "." not in host or not _TOP_LABEL.fullmatch(top) or top in _LOCAL_TOPS
    ):
        raise UrlNotAllowed("host must be a public DNS name")
    if any(host == name or host.endswith(f".{name}") for name in policy.denied_names):
        raise UrlNotAllowed("host is on the denylist of this server")


def is_address(host: str) -> bool:
    """Return whether the host is an IP address and not a name."""
    return _parse_address(host) is not None


def _parse_address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_name(host: str) -> bool:
    return len(host) <= 253 and all(map(_LABEL.fullmatch, host.split(".")))  # noqa: PLR2004  # RFC 1035
