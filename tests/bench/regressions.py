"""Entry points of pytest-benchmark, one per operation: ``pytest tests/bench/regressions.py --benchmark-autosave``.

Not collected by name: timings are no tests. ``--benchmark-compare`` tells what became slower since the last saved run.
"""

import pytest
import torch

from fedgram.bench.registry import entries
from fedgram.bench.run_case import check

pytest.importorskip("pytest_benchmark", reason="pip install 'fedgram[bench]'")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.name)
def test_ours(entry, benchmark):
    device = torch.device("cpu")
    case = entry.build("quick", device)
    checked = check(case, case.ours, device)
    assert checked.right, checked.error
    benchmark.extra_info["workload"] = case.workload
    benchmark(case.ours.run)
