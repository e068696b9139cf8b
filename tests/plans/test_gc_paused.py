"""The collector is paused in the body and restored after it, even if the body fails."""

from __future__ import annotations

import gc

import pytest

from plans.gc_paused import gc_paused


def test_the_collector_is_paused_and_restored() -> None:
    assert gc.isenabled()
    with gc_paused(), gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="wrong"), gc_paused():
        raise ValueError("wrong")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with gc_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
