"""What all tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more only wait for each other in models this small; read when torch is imported

import pytest  # noqa: E402

import train  # noqa: E402


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Runs without their picture, which takes most of the time of a small one."""
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
