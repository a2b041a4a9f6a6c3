"""What all tests share."""

import pytest

import train


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Runs without their picture, which takes most of the time of a small one."""
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
