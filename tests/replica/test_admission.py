"""Turns with the model: who may be there beside whom, and that nobody is overtaken."""

import asyncio
import random

import pytest

from workers.replica.admission import AdmissionGate


def test_a_few_are_let_in_together_or_one_that_is_alone():
    present, seen = [], []

    async def visit(turns, name, alone):
        async with turns.taken(alone=alone):
            present.append((name, alone))
            seen.append(list(present))
            for _ in range(name % 3 + 1):
                await asyncio.sleep(0)
            present.remove((name, alone))

    async def crowd():
        turns = AdmissionGate(2)
        dice = random.Random(3)
        async with asyncio.TaskGroup() as group:
            for name in range(200):
                group.create_task(visit(turns, name, dice.random() < 0.3))

    asyncio.run(crowd())
    assert max(map(len, seen)) == 2
    assert not [who for who in seen if len(who) > 1 and any(alone for _, alone in who)]
    assert [who[-1][0] for who in seen] == list(range(200))  # in the order in which they came


@pytest.mark.parametrize("alone", [False, True])
def test_who_gives_up_in_line_leaves_no_place_taken(alone):
    async def given_up():
        turns = AdmissionGate(2)
        async with turns.taken(alone=False):
            line = asyncio.create_task(turns.taken(alone=True).__aenter__())
            behind = asyncio.create_task(turns.taken(alone=alone).__aenter__())
            await asyncio.sleep(0.01)
            assert not line.done()
            line.cancel()
            behind.cancel()
            await asyncio.gather(line, behind, return_exceptions=True)
        async with asyncio.timeout(1), turns.taken(alone=True):
            return True

    assert asyncio.run(given_up())
