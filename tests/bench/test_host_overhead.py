"""What the host spends is measured without kernels: every launch is counted, none runs."""

import importlib.util

import pytest

from fedgram.bench import host_overhead

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_every_operation_launches_and_nothing_is_computed(monkeypatch):
    from triton.runtime import interpreter

    ran = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: ran.append(1))
    rows = host_overhead.measure(((24, 20), (40, 20)), 3, 2)
    assert not ran
    counted = {(row["factors"], row["name"]): row["launches"] for row in rows if "launches" in row}
    assert len(counted) == 3 * 4 + 2 * 2
    assert all(counted.values())
