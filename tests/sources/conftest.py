"""What the tests of sources share."""
import numpy as np
import pytest

from hand.builtin import builtin_hand


@pytest.fixture(scope="session")
def hand():
    """A right hand whose mean pose is not flat, as MANO's."""
    return builtin_hand() | {"hands_mean": np.random.default_rng(3).normal(0, 0.2, 45)}
