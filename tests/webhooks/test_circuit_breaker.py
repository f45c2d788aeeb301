"""Small rules of the sender, without a network: the gate, signatures, seals, answers."""

import base64
import re
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from darkroom.errors import SetupError
from darkroom.webhooks import signatures
from darkroom.webhooks.deliveries import AttemptOutcome, Claim
from darkroom.webhooks.secret_box import SecretBox
from workers.webhooks.circuit_breaker import AT_ONCE, DestinationLimiter
from workers.webhooks.transport import classify_response

OK, FAILED, TIMEOUT = AttemptOutcome.HTTP_2XX, AttemptOutcome.HTTP_5XX, AttemptOutcome.TIMEOUT


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def letter(number, endpoint="whk_a", tenant="ten_a"):
    return Claim(
        id=f"dlv_{endpoint}_{number}",
        token=1,
        tenant_id=tenant,
        endpoint_id=endpoint,
        url="https://ok.example/",
        message_id="evt_1",
        type="job.failed",
        event_ids=[1],
        failures=0,
    )


def sent(gate, claim, outcome, seconds=0.01):
    assert gate.admit(claim) is None
    gate.learn(claim, outcome, seconds)
    gate.leave(claim)


def admitted(gate, claims):
    return [claim for claim in claims if gate.admit(claim) is None]


# --- the gate -------------------------------------------------------------------------------------


def test_a_stranger_gets_one_place_and_a_known_good_one_many(clock):
    gate = DestinationLimiter(1000, clock=clock)
    crowd = [letter(number) for number in range(500)]
    assert len(admitted(gate, crowd)) == 1
    gate.learn(crowd[0], OK, 0.01)
    gate.leave(crowd[0])

    assert len(admitted(gate, crowd)) == AT_ONCE * 32


def test_a_slow_one_gets_no_more_than_it_can_take_soon(clock):
    gate = DestinationLimiter(1000, clock=clock)
    for number in range(20):
        sent(gate, letter(number), OK, seconds=10)

    assert len(admitted(gate, [letter(number) for number in range(500)])) == AT_ONCE


def test_those_that_hang_hold_one_place_each(clock):
    gate = DestinationLimiter(2000, clock=clock)
    hanging = [letter(n, f"whk_{each}") for each in range(950) for n in range(3)]
    assert len(admitted(gate, hanging)) == 950
    good = [letter(n, f"whk_good{each}") for each in range(50) for n in range(3)]
    first = admitted(gate, good)
    for claim in first:
        gate.learn(claim, OK, 0.01)
        gate.leave(claim)

    assert len(first) == 50
    assert len(admitted(gate, good)) == 150


def test_strangers_never_take_all_the_room(clock):
    gate = DestinationLimiter(100, clock=clock)
    sent(gate, letter(0, "whk_good", "ten_b"), OK)
    strangers = [letter(1, f"whk_{each}", f"ten_{each}") for each in range(200)]

    assert len(admitted(gate, strangers)) == 75
    assert len(admitted(gate, [letter(n, "whk_good", "ten_b") for n in range(30)])) == 25


def test_no_tenant_takes_all_the_room(clock):
    gate = DestinationLimiter(100, clock=clock)
    for each in range(200):
        sent(gate, letter(0, f"whk_{each}"), OK)
    mine = [letter(1, f"whk_{each}") for each in range(200)]

    assert len(admitted(gate, mine)) == 75
    assert gate.admit(letter(1, "whk_other", "ten_b")) is None


def test_after_failures_in_a_row_it_rests_ever_longer_then_is_probed(clock):
    gate = DestinationLimiter(100, clock=clock)
    sent(gate, letter(0), OK)
    for number in range(10):
        sent(gate, letter(number), FAILED)
    rests = []
    for _ in range(9):
        wait_s = gate.admit(letter(1))
        rests.append(wait_s)
        clock.now += wait_s
        sent(gate, letter(1), FAILED)

    planned = [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert rests == pytest.approx(planned, rel=0.11)
    clock.now += 400
    sent(gate, letter(1), OK)
    assert len(admitted(gate, [letter(number) for number in range(50)])) == 50


def test_a_receiver_that_asks_for_rest_gets_it_but_not_for_ever(clock):
    gate = DestinationLimiter(100, clock=clock)
    first, second = letter(1), letter(2, "whk_other")
    for claim, rest_s in ((first, 60.0), (second, 10**6)):
        assert gate.admit(claim) is None
        gate.learn(claim, FAILED, 0.01, rest_s=rest_s)
        gate.leave(claim)

    assert 59 < gate.admit(first) < 70
    assert 290 < gate.admit(second) < 340
    clock.now += 61
    assert gate.admit(first) is None


def test_the_first_good_answer_calls_those_who_were_put_off(clock):
    gate = DestinationLimiter(100, clock=clock)
    first, second = letter(1), letter(2)
    assert gate.admit(first) is None
    assert gate.admit(second) > 0
    assert gate.learn(first, OK, 0.01)
    assert not gate.learn(first, OK, 0.01)
    gate.leave(first)
    sent(gate, letter(3, "whk_other"), OK)  # for whom nobody waits
    assert gate.admit(second) is None


def test_timeouts_count_for_more_than_refusals(clock):
    gate = DestinationLimiter(100, clock=clock)
    for number in range(3):
        sent(gate, letter(number), TIMEOUT)

    assert gate.admit(letter(9)) > 4


def test_a_few_failures_among_successes_change_little(clock):
    gate = DestinationLimiter(1000, clock=clock)
    for number in range(100):
        sent(gate, letter(number), FAILED if number % 3 else OK)

    assert len(admitted(gate, [letter(number) for number in range(50)])) == 50


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([OK, FAILED, TIMEOUT, None]))))
def test_the_books_balance_whatever_happens(steps):
    clock = Clock()
    gate = DestinationLimiter(16, clock=clock)
    inside = []
    for number, (endpoint, outcome) in enumerate(steps):
        clock.now += 1
        claim = letter(number, f"whk_{endpoint}", f"ten_{endpoint % 2}")
        wait_s = gate.admit(claim)
        assert wait_s is None or wait_s > 0
        if wait_s is None:
            inside.append((claim, outcome))
        if len(inside) > 4 or (outcome is None and inside):
            leaving, how = inside.pop(0)
            if how is not None:
                gate.learn(leaving, how, 0.5)
            gate.leave(leaving)
        assert gate.room == 16 - len(inside) >= 0
    for claim, _ in inside:
        gate.leave(claim)
    assert gate.room == 16


# --- signatures -----------------------------------------------------------------------------------


def test_the_official_verifier_accepts_ours():
    secret = signatures.new_secret()
    now = int(time.time())
    headers = signatures.headers("evt_1", now, b'{"a":"\xc3\xa4"}', shared=[secret])

    assert Webhook(secret).verify(b'{"a":"\xc3\xa4"}', headers) == {"a": "ä"}
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(b'{"a":"b"}', headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(signatures.new_secret()).verify(b'{"a":"\xc3\xa4"}', headers)


def test_secrets_have_the_form_of_the_standard():
    secret = signatures.new_secret()

    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", secret)
    assert 24 <= len(base64.b64decode(secret.removeprefix("whsec_"))) <= 64


def test_while_a_secret_is_replaced_either_verifies():
    old, new = signatures.new_secret(), signatures.new_secret()
    now = int(time.time())
    headers = signatures.headers("evt_1", now, b"{}", shared=[new, old])

    for secret in (old, new):
        Webhook(secret).verify(b"{}", headers)


def test_with_a_key_pair_there_is_a_second_kind_of_signature():
    new, old = signatures.new_private_key(), signatures.new_private_key()
    private = signatures.private_keys(f"{new}, {old}")
    secret = signatures.new_secret()
    now = int(time.time())
    headers = signatures.headers("evt_1", now, b"{}", shared=[secret], private=private)

    Webhook(secret).verify(b"{}", headers)
    v1a = [
        each.removeprefix("v1a,")
        for each in headers["webhook-signature"].split(" ")
        if each.startswith("v1a,")
    ]
    content = f"evt_1.{now}.".encode() + b"{}"
    for key, signature in zip(private, v1a, strict=True):
        raw = base64.b64decode(signatures.public_key(key).removeprefix("whpk_"))
        Ed25519PublicKey.from_public_bytes(raw).verify(base64.b64decode(signature), content)


@pytest.mark.parametrize("text", ["whsk_", "whsk_!", "whsk_AAAA", "AAAA", "whsec_" + "A" * 44])
def test_a_key_that_is_none_is_told_at_the_start(text):
    with pytest.raises(SetupError, match="DARKROOM_WEBHOOK_SIGNING_KEY"):
        signatures.private_keys(text)


# --- seals ----------------------------------------------------------------------------------------


def test_a_sealed_secret_says_nothing_without_its_key():
    sealed = SecretBox("key").close("whsec_abc")

    assert "abc" not in sealed
    assert SecretBox("key").open(sealed) == "whsec_abc"
    for keys in ("", "another"):
        with pytest.raises(SetupError, match="DARKROOM_WEBHOOK_ENCRYPTION_KEYS"):
            SecretBox(keys).open(sealed)


def test_a_key_is_replaced_by_adding_one():
    old = SecretBox("old").close("whsec_abc")
    both = SecretBox("new, old")

    assert both.open(old) == "whsec_abc"
    assert SecretBox("new").open(both.close("whsec_def")) == "whsec_def"


def test_what_was_kept_without_a_key_stays_readable_with_one():
    assert SecretBox("key").open(SecretBox("").close("whsec_abc")) == "whsec_abc"


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "http_2xx"),
        (202, "http_2xx"),
        (204, "http_2xx"),
        (301, "http_3xx"),
        (304, "http_3xx"),
        (400, "http_4xx"),
        (404, "http_4xx"),
        (410, "http_410"),
        (429, "http_4xx"),
        (500, "http_5xx"),
        (101, "invalid_response"),
        (799, "invalid_response"),
    ],
)
def test_only_2xx_is_success(status, outcome):
    assert classify_response(status, {}).outcome == outcome


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120),
        ("0", 0),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("1e9", None),
        ("9" * 400, None),
        ("\u0663", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_or_nothing(text, seconds):
    headers = {b"Retry-After": text.encode("utf-8")}

    assert classify_response(503, headers).retry_after_s == seconds


@pytest.mark.parametrize(("status", "overloaded"), [(429, True), (503, True), (500, False)])
def test_some_wishes_are_meant_for_all_that_waits(status, overloaded):
    assert classify_response(status, {}).overloaded is overloaded


def test_retry_after_may_be_a_date():
    headers = {b"retry-after": b"Fri, 31 Dec 2100 23:59:59 GMT"}

    assert classify_response(429, headers).retry_after_s > 10**9
