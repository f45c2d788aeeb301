"""Which URLs may be called for a stranger: rules for what a URL says, and for where it leads.

A URL is judged twice, each time as text and as the addresses behind it: when it is registered
(`check_url`) and, resolved anew, whenever it is called (`check_url`, then `check_address` for each
address). What `ipaddress` calls global is not enough: it lets NAT64, 6to4 and others pass.
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
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


_CLOSED: Final = _networks(
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
    # Within 2000::/3; of IPv6 all else is refused anyway.
    "2001::/23",  # Teredo, ORCHID and other protocols
    "2001:db8::/32",
    "2002::/16",  # 6to4: an IPv4 address in disguise
    "2620:4f:8000::/48",
    "3fff::/20",
)
_GLOBAL_V6: Final = IPv6Network("2000::/3")
#: What `allow_private` opens: a developer's own machine and network, but no metadata service.
_PRIVATE: Final = _networks(
    "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"
)
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII | re.IGNORECASE)
_TOP_LABEL: Final = re.compile(r"[a-z]{2,63}|xn--[a-z0-9-]{1,59}", re.ASCII | re.IGNORECASE)
#: Names that lead inside wherever they lead anywhere; none is a public top-level domain.
_LOCAL_TOPS: Final = frozenset(
    (
        *("alt", "arpa", "cluster", "consul", "corp", "default", "docker", "domain", "home"),
        *("internal", "intranet", "invalid", "lan", "local", "localdomain", "localhost"),
        *("localnet", "mshome", "onion", "private", "svc", "test", "workgroup"),
    )
)
#: What stands between the slashes: no user, and a port, if any, in digits that all read alike.
_AUTHORITY: Final = re.compile(r"[^/?#]*//(\[[^]@]*\]|[^]:@/?#\[]+)(:[0-9]{1,5})?(?=[/?#]|$)")


class UrlNotAllowed(DarkroomError):
    """The URL, or the address behind it, is not one that we call."""


@dataclass(frozen=True)
class UrlPolicy:
    """What may be called. The default: https on public addresses, on two ports."""

    schemes: frozenset[str] = frozenset({"https"})
    ports: frozenset[int] | None = frozenset({443, 8443})  #: None: any
    private: bool = False  #: also loopback, private networks and names without a dot
    denied_networks: tuple[Network, ...] = ()  #: the operator's own, whatever else is allowed
    denied_names: tuple[str, ...] = ()  #: likewise; with all names below them


def policy_of(settings: Settings) -> UrlPolicy:
    """The policy that the settings describe. Raises SetupError when they cannot be read."""
    networks, names = _deny_list(settings.webhook_denylist)
    if settings.webhook_allow_private:
        both = frozenset(_DEFAULT_PORTS)
        return UrlPolicy(both, None, private=True, denied_networks=networks, denied_names=names)
    return UrlPolicy(denied_networks=networks, denied_names=names)


def _deny_list(text: str) -> tuple[tuple[Network, ...], tuple[str, ...]]:
    networks: list[Network] = []
    names: list[str] = []
    for entry in re.split(r"[\s,]+", text.strip()):
        try:
            networks.append(ipaddress.ip_network(entry))
        except ValueError as error:
            name = entry.removeprefix(".").lower()
            if entry and (not _is_name(name) or _TOP_LABEL.fullmatch(name.split(".")[-1]) is None):
                raise SetupError(
                    f"DARKROOM_WEBHOOK_DENYLIST: {entry!r} is neither a network (203.0.113.0/24, "
                    "its host bits zero) nor a name (example.com)"
                ) from error
            names += [name] if entry else []
    return tuple(networks), tuple(names)


def check_address(text: str, policy: UrlPolicy) -> Address:
    """The address, in its shortest meaning, if it may be connected to. Raises Blocked."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise UrlNotAllowed("the address is not one") from error
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    opened = policy.private and _in(address, _PRIVATE)
    if _in(address, policy.denied_networks) or not (opened or _is_public(address)):
        raise UrlNotAllowed("the address is not a public one")
    return address


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and (address.scope_id or address not in _GLOBAL_V6):
        return False
    return address.is_global and not address.is_multicast and not _in(address, _CLOSED)


def _in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


@dataclass(frozen=True)
class VettedUrl:
    """A vetted URL in the parts that go on the wire; `host` is ASCII, without brackets."""

    scheme: str
    host: str
    port: int
    path: str  #: with its query; percent-encoded


def check_url(url: str, policy: UrlPolicy) -> VettedUrl:
    """What of a URL can be judged without asking anybody. Raises Blocked, in words for its owner.

    Parsed once: what is connected to later is what was judged here.
    """
    parsed = _parsed(url)
    if parsed.scheme not in policy.schemes:
        raise UrlNotAllowed(f"must begin with {' or '.join(sorted(policy.schemes))}://")
    if parsed.userinfo:
        raise UrlNotAllowed("must not hold a user name or password")
    if not _AUTHORITY.match(url):
        raise UrlNotAllowed(
            "is not a URL: between // and the path stands a host, and perhaps a port"
        )
    port = _DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
    if port == 0 or (policy.ports is not None and port not in policy.ports):
        allowed = " and ".join(map(str, sorted(policy.ports or {})))
        raise UrlNotAllowed(f"its port is not allowed; allowed: {allowed or 'any but 0'}")
    host = parsed.raw_host.decode("ascii").lower()
    _check_host(host, policy)
    return VettedUrl(parsed.scheme, host, port, parsed.raw_path.decode("ascii"))


def _parsed(url: str) -> httpx2.URL:
    if len(url) > MAX_URL_CHARS:
        raise UrlNotAllowed(f"is longer than {MAX_URL_CHARS} characters")
    if "\\" in url or any(character == " " or not character.isprintable() for character in url):
        raise UrlNotAllowed("is not a URL: it holds a space, a backslash or a control character")
    try:
        return httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise UrlNotAllowed("is not a URL") from error


def _check_host(host: str, policy: UrlPolicy) -> None:
    address = _as_address(host)
    if address is not None:
        check_address(str(address), policy)
        return
    if not _is_name(host):
        raise UrlNotAllowed("its host is not a name")
    top = host.rsplit(".", maxsplit=1)[-1]
    if not policy.private and (
        "." not in host or not _TOP_LABEL.fullmatch(top) or top in _LOCAL_TOPS
    ):
        raise UrlNotAllowed("its host is not a public name")
    if any(host == name or host.endswith(f".{name}") for name in policy.denied_names):
        raise UrlNotAllowed("its host is not allowed here")


def is_address(host: str) -> bool:
    """Whether it is an address itself, and not a name that has some."""
    return _as_address(host) is not None


def _as_address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_name(host: str) -> bool:
    return len(host) <= 253 and all(map(_LABEL.fullmatch, host.split(".")))  # noqa: PLR2004  # RFC 1035
