"""The campaign itself: a sample of its rounds, and that it finds what is planted."""

from __future__ import annotations

import pytest

from tests.campaign import PLANTS, campaign
from tests.tools import SEED


async def test_a_sample_of_rounds() -> None:
    """Random migrations in processes with faults end as without (`python -m tests.campaign`)."""
    assert await campaign(str(SEED), minutes=2, plant="", rounds=3) == []


@pytest.mark.campaign
@pytest.mark.parametrize("plant", [name for name in PLANTS if name])
async def test_what_is_planted_is_found(plant: str) -> None:
    """A library that is broken in one way is found out: the oracle can fail."""
    assert await campaign(f"{SEED} plant", minutes=3, plant=plant) != []
