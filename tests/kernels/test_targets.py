"""What kernels choose by the GPU they run on, told apart without one."""

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
GPU = torch.device("cuda", 0)


@pytest.fixture
def common(monkeypatch):
    from fedgram.kernels import _triton_common

    def on(major, minor, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.version, "hip", hip)
        return _triton_common

    return on


@pytest.mark.parametrize(
    ("capability", "name", "doubles"),
    [((8, 0), "sm80", True), ((8, 6), "sm80", False), ((8, 9), "sm80", False), ((9, 0), "sm90", True),
     ((10, 0), "sm100", False), ((12, 0), "sm100", False)],
)  # fmt: skip
def test_the_generation_and_its_float64_tensor_cores(common, capability, name, doubles):
    found = common(*capability)
    assert found.generation(GPU) == name
    assert found.has_double_cores(GPU) is doubles
    assert found.factor_precision({torch.float32}, GPU, precise=False) == ("fp64" if doubles else "tf32x3")
    assert found.factor_precision({torch.bfloat16, torch.float32}, GPU, precise=False) == (
        "fp64" if doubles else "tf32x3"
    )
    assert found.factor_precision({torch.bfloat16}, GPU, precise=False) == "native"
    assert found.factor_precision({torch.bfloat16}, GPU, precise=True) == "fp64"


def test_amd_and_the_interpreter(common):
    found = common(9, 0, "6.0")
    assert found.generation(GPU) == "gfx942"
    assert not found.has_double_cores(GPU)
    assert "maxnreg" not in found.options(1, 3, 168)
    found = common(9, 0)
    assert found.options(1, 3, 168)["maxnreg"] == 168
    assert "maxnreg" not in found.options(1, 3)
    assert found.generation(torch.device("cpu")) == "sm90"
    assert found.factor_precision({torch.float32}, torch.device("cpu"), precise=False) == "tf32x3"


def test_every_target_has_the_same_configurations():
    from fedgram.bench import aot

    names = [[c.name for _, _, c in aot.shipped_configs(target)] for target in aot.TARGETS]
    assert all(found == names[0] for found in names)
    assert len(set(names[0])) == len(names[0])


@pytest.mark.parametrize("generation", ["sm90", "sm100"])
@pytest.mark.parametrize(
    ("dtype", "precisions", "ranks", "other"),
    [(torch.float32, ("fp64", "tf32x3"), [8] * 10, 8), (torch.bfloat16, ("native", "fp64"), [16] * 100, 16),
     (torch.bfloat16, ("native", "fp64"), [8], None), (torch.bfloat16, ("native", "fp64"), [8] * 10, None),
     (torch.bfloat16, ("fp64",), [16] * 16, None), (torch.float32, ("fp64",), [8], None),
     (torch.float32, ("fp64",), [16] * 16, 16), (torch.float32, ("fp64",), [16] * 40, None),
     (torch.float64, ("fp64",), [8], None)],
)  # fmt: skip
def test_what_factor_gram_launches_is_compiled_ahead(generation, dtype, precisions, ranks, other):
    """Of the workloads that are quoted, and total ranks between: a gate over what no plan asks for guards nothing."""
    from fedgram.kernels._factor_gram_plan import GramPlan, Task
    from fedgram.kernels._factor_gram_triton import aot_configs, configuration
    from fedgram.kernels._factor_plan import Piece

    def pieces(ranks):
        return [Piece.of(u, torch.empty(512, r, dtype=dtype), transposed=False) for u, r in enumerate(ranks)]

    gated = [(dict(c.constexprs), c.num_warps, c.num_stages) for c in aot_configs(generation)]
    for precision in precisions:
        tasks = [Task(pieces(ranks), None, precision)]
        if precision != "tf32x3" and other:
            tasks.append(Task(pieces(ranks), pieces([other]), precision))
        for batch in GramPlan(tasks, torch.device("cpu")).batches:
            for variant, _ in batch.launches:
                assert configuration(variant, generation) in gated, variant
