"""No webhook reaches a forbidden address: in a closed network that records each connection."""

import ipaddress
import json
import os
import re
import shutil
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import SetupError
from darkroom.settings import HOME, Settings
from darkroom.webhooks import url_policy
from darkroom.webhooks.url_policy import (
    UrlNotAllowed,
    UrlPolicy,
    check_address,
    check_url,
    policy_of,
)
from tests.support import closed_network
from tests.support.closed_network_servers import PUBLIC_4, PUBLIC_6
from tests.support.hostile_urls import BLOCKED_AS_TEXT, HARMLESS, NAMES

PLAIN_TOO = UrlPolicy(frozenset({"http", "https"}), frozenset({80, 443, 8443}))
PRIVATE = policy_of(Settings(webhook_allow_private=True))


def secure(url):
    return f"https{url.removeprefix('http')}"


def found(command, *arguments):
    result = closed_network.run(command, *arguments)
    if reason := result.get(closed_network.UNAVAILABLE):
        pytest.skip(f"no namespaces here: {reason}")
    return result


@pytest.fixture(scope="module")
def bench():
    return found("bench", json.dumps([*BLOCKED_AS_TEXT, *NAMES, *HARMLESS]))


# --- in the closed network ------------------------------------------------------------------------


def test_nothing_that_is_not_public_was_ever_connected_to(bench):
    assert bench["leaks"] == []
    assert bench["leaks_after"] == []
    assert bench["hits"] > 10
    report(bench)


def report(bench):
    """Print the figures for `pytest -rP`."""
    tried = [bench["urls"][url] for url in (*BLOCKED_AS_TEXT, *NAMES)]
    tried += [was for url, was in bench["secure"].items() if url not in map(secure, HARMLESS)]
    print(f"{len(tried)} hostile URLs, https among them: {dict(Counter(tried))}; 0 leaks")  # noqa: T201
    for path, (was, seconds, grown_mib) in bench["hostile"].items():
        print(f"{path}: {was} after {seconds:.1f} s, {grown_mib:+.1f} MiB")  # noqa: T201
    for url, was in (bench["allowed"] | bench["tls"]).items():
        print(f"{url}: {was}")  # noqa: T201


def test_the_canary_notices_the_leaks_of_a_usual_client(bench):
    assert {tuple(hit) for hit in bench["naive"]} >= {
        ("127.0.0.1", 6379),
        ("169.254.169.254", 80),
        ("127.0.0.1", 80),
        ("10.0.0.1", 8265),
    }


@pytest.mark.parametrize("url", [*BLOCKED_AS_TEXT, *NAMES])
def test_a_hostile_url_is_blocked(bench, url):
    outcomes = {"blocked", "unreachable"} if url in NAMES else {"blocked"}

    assert bench["urls"][url] in outcomes
    if url.startswith("http://"):
        assert bench["secure"][secure(url)] in outcomes


@pytest.mark.parametrize("url", HARMLESS)
def test_a_harmless_url_has_its_outcome(bench, url):
    assert bench["urls"][url] == HARMLESS[url]


def test_a_name_that_alternates_is_checked_at_every_attempt(bench):
    assert set(bench["rebind"]) == {"http_2xx", "blocked"}


def test_both_families_work_and_so_does_a_second_address(bench):
    assert set(bench["allowed"].values()) == {"http_2xx"}
    assert len(bench["allowed"]) == 3


def test_the_operators_denylist_is_blocked(bench):
    assert set(bench["denied"].values()) == {"blocked"}


def test_certificates_are_checked_against_the_name_of_the_url(bench):
    right = {"https://ok.example/hook", "https://ok6.example:8443/hook"}

    for url, outcome in bench["tls"].items():
        assert outcome == ("http_2xx" if url in right else "tls"), url
    assert {
        "ok.example",
        "ok6.example",
        "other.example",
        "badca.example",
        "expired.example",
    } <= set(bench["names"])


@pytest.mark.parametrize(
    ("path", "outcome"),
    [
        ("/big", "http_2xx"),
        ("/gzbomb", "http_2xx"),
        ("/drip", "http_2xx"),  # its status came in time, which decides
        ("/hdrdrip", "timeout"),
        ("/hang", "timeout"),
        ("/hdrbig", "invalid_response"),
        ("/100", "invalid_response"),
        ("/garbage", "invalid_response"),
        ("/reset", "unreachable"),
    ],
)
def test_a_hostile_answer_costs_neither_time_nor_memory(bench, path, outcome):
    was, seconds, grown_mib = bench["hostile"][path]

    assert was == outcome
    assert seconds < closed_network.DEADLINE_S + 20  # without an end it would be a minute
    assert grown_mib < 5


def test_slow_names_do_not_delay_other_names():
    result = found("names")

    assert [outcome for outcome, _ in result["healthy"]] == ["http_2xx"] * 20
    assert {outcome for outcome, _ in result["slow"]} == {"unreachable"}
    slowest = sorted(seconds for _, seconds in result["healthy"])[18]  # p95
    print(f"beside 180 names that hang or fail: healthy p95 {slowest:.2f} s")  # noqa: T201
    assert slowest < 10  # queued behind the slow ones it would be minutes


# --- as text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", BLOCKED_AS_TEXT)
def test_a_hostile_url_is_rejected_before_a_lookup(url):
    with pytest.raises(UrlNotAllowed):
        check_url(url, PLAIN_TOO)
    if url.startswith("http://"):
        with pytest.raises(UrlNotAllowed):
            check_url(secure(url), UrlPolicy())


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("https://example.com", ("example.com", 443, "/")),
        ("https://Example.COM:8443/a?b=c#d", ("example.com", 8443, "/a?b=c")),
        ("https://bücher.example/ä", ("xn--bcher-kva.example", 443, "/%C3%A4")),
        ("https://93.184.216.34/", ("93.184.216.34", 443, "/")),
        ("https://[2606:2800:220:1::1]/", ("2606:2800:220:1::1", 443, "/")),
        ("https://ok.example/%0d%0aSET%20a", ("ok.example", 443, "/%0d%0aSET%20a")),
    ],
)
def test_a_good_url_is_split_into_its_parts(url, parts):
    vetted = check_url(url, UrlPolicy())

    assert (vetted.host, vetted.port, vetted.path) == parts


@given(st.ip_addresses())
def test_an_address_that_passes_is_global(address):
    try:
        vetted = check_address(str(address), UrlPolicy())
    except UrlNotAllowed:
        return
    assert vetted.is_global
    assert not vetted.is_private
    assert not vetted.is_multicast
    assert not vetted.is_reserved
    assert vetted.version == 4 or vetted in ipaddress.ip_network("2000::/3")


@given(st.ip_addresses(v=4))
def test_no_ipv6_form_of_a_forbidden_ipv4_address_passes(address):
    try:
        check_address(str(address), UrlPolicy())
    except UrlNotAllowed:
        packed = int(address)
        for form in (
            f"::ffff:{address}",
            ipaddress.IPv6Address((0x64FF9B << 96) | packed),
            ipaddress.IPv6Address((0x2002 << 112) | (packed << 80) | 1),
            ipaddress.IPv6Address(packed),
        ):
            with pytest.raises(UrlNotAllowed):
                check_address(str(form), UrlPolicy())


@given(st.text(max_size=60))
def test_any_text_is_either_rejected_or_a_safe_url(text):
    for url in (text, f"https://{text}", f"https://ok.example{text}"):
        try:
            vetted = check_url(url, UrlPolicy())
        except UrlNotAllowed:
            continue
        assert vetted.scheme == "https"
        assert vetted.port in {443, 8443}
        assert vetted.path.startswith("/")
        assert vetted.path.isascii()
        assert not set(vetted.path + vetted.host) & set("\r\n\t \\")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9000/",
        "http://localhost:9000/",
        "http://[::1]:9000/",
        "http://receiver:8080/hook",
        "http://192.168.0.7/",
        "https://ok.example/",
    ],
)
def test_a_developer_may_allow_private_addresses(url):
    check_url(url, PRIVATE)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "http://100.100.100.200/",
        "http://168.63.129.16/",
        "http://0.0.0.0/",
        "http://[fe80::1]/",
        "http://user@127.0.0.1/",
        "ftp://127.0.0.1/",
    ],
)
def test_private_addresses_exclude_metadata_services(url):
    with pytest.raises(UrlNotAllowed):
        check_url(url, PRIVATE)


def test_the_denylist_is_stronger_than_private_addresses():
    policy = policy_of(
        Settings(webhook_allow_private=True, webhook_denylist="127.0.0.0/8, 10.1.2.3 .corp.example")
    )

    for url in ("http://127.0.0.1/", "http://10.1.2.3/", "http://a.corp.example/"):
        with pytest.raises(UrlNotAllowed):
            check_url(url, policy)
    check_url("http://10.1.2.4/", policy)
    check_url("http://notcorp.example/", policy)


@pytest.mark.parametrize("entry", ["10.0.0.1/8", "10.0.0.0/33", "what?", "a..b", "10.0.0"])
def test_an_invalid_denylist_is_rejected_at_the_start(entry):
    with pytest.raises(SetupError, match="DARKROOM_WEBHOOK_DENYLIST"):
        policy_of(Settings(webhook_denylist=entry))


# --- the firewall ------------------------------------------------------------------

REFUSED = [
    "127.0.0.1|80",
    "127.0.0.1|8265",
    "10.0.0.1|80",
    "172.16.0.1|80",
    "192.168.0.1|80",
    "169.254.169.254|80",
    "100.64.0.1|80",
    "168.63.129.16|80",
    "198.18.0.1|80",
    "240.0.0.1|80",
    "::1|80",
    "fd00::1|80",
    "64:ff9b::a9fe:a9fe|80",
    "2002:a9fe:a9fe::1|80",
    "2001:db8::1|80",
    f"{PUBLIC_4}|25",
    f"{PUBLIC_4}|6379",
    f"{PUBLIC_6}|22",
]
ALLOWED = [
    f"{PUBLIC_4}|443",
    f"{PUBLIC_6}|8443",
    "127.0.0.1|5432",
    "127.0.0.1|6379",
]


def nft(*arguments):
    if shutil.which("nft") is None or shutil.which("setpriv") is None:
        pytest.skip("nft or setpriv is not installed")
    return found("firewall", str(HOME / "deploy" / "nftables"), *arguments)


def test_the_firewall_keeps_the_senders_user_on_public_addresses():
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    reached = nft("sender.nft", "10003", *REFUSED, *ALLOWED)

    assert {place for place in REFUSED if reached["sender"][place] != "refused"} == set()
    assert {place for place in ALLOWED if reached["sender"][place] != "open"} == set()
    assert set(reached["others"].values()) == {"open"}


def test_the_rules_for_containers_load():
    nft("containers.nft", "")


def test_the_firewall_blocks_the_networks_of_the_url_policy():
    rules = (HOME / "deploy" / "nftables" / "closed.nft").read_text()
    networks = re.findall(r"[0-9a-f.:]+/\d+", rules.replace("2000::/3", ""))

    assert {ipaddress.ip_network(network) for network in networks} == set(url_policy._NOT_PUBLIC)
