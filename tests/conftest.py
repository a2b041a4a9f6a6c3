"""What all tests share."""

import pytest

import train


@pytest.fixture(autouse=True)
def unadorned(monkeypatch):
    """Runs without what takes three of their four seconds: the rate of products (here 10⁹ FLOP/s), and the curves."""
    monkeypatch.setattr(train, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
