"""Admission to the model: which microbatches share it, and their order."""

import asyncio
import random

import pytest

from workers.replica.admission import AdmissionGate


def test_a_few_are_admitted_at_once_or_one_that_is_alone():
    present, seen = [], []

    async def visit(gate, name, alone):
        async with gate.admitted(alone=alone):
            present.append((name, alone))
            seen.append(list(present))
            for _ in range(name % 3 + 1):
                await asyncio.sleep(0)
            present.remove((name, alone))

    async def many():
        gate = AdmissionGate(2)
        dice = random.Random(3)
        async with asyncio.TaskGroup() as group:
            for name in range(200):
                group.create_task(visit(gate, name, dice.random() < 0.3))

    asyncio.run(many())
    assert max(map(len, seen)) == 2
    shared = [admitted for admitted in seen if len(admitted) > 1]
    assert not any(alone for admitted in shared for _, alone in admitted)
    assert [admitted[-1][0] for admitted in seen] == list(range(200))  # in order of arrival


@pytest.mark.parametrize("alone", [False, True])
def test_a_request_canceled_while_it_waits_leaves_no_slot_taken(alone):
    async def given_up():
        gate = AdmissionGate(2)
        async with gate.admitted(alone=False):
            first = asyncio.create_task(gate.admitted(alone=True).__aenter__())
            behind = asyncio.create_task(gate.admitted(alone=alone).__aenter__())
            await asyncio.sleep(0)
            assert not first.done()
            first.cancel()
            behind.cancel()
            await asyncio.gather(first, behind, return_exceptions=True)
        async with asyncio.timeout(1), gate.admitted(alone=True):
            return True

    assert asyncio.run(given_up())
