"""The names of the public contract, importable as users import them, and documented."""

import importlib
import inspect
from pathlib import Path

import pytest

CONTRACT = {
    "fedgram.flora_na": "LoraLayer Adapter estimate aggregate aggregate_for_clients client_gramian inspect "
    "iter_aggregate estimate_modules",
    "fedgram.stamp": "match match_ solve_dual gramian ghost_gramian select_prototypes PrototypeMemory "
    "TemporalMatcher SpatialMatcher",
    "fedgram.kernels": "factor_gram factor_combine lowrank_sum grad_gram grad_combine ghost_gram subset_select",
    "fedgram.bindings.peft": "load_adapter save_adapter",
    "fedgram.bindings.modules": "LoraAggregator StateDictAggregator StateDictMatcher",
    "fedgram.bindings.matching": "match_adapters",
    "fedgram.bindings.plain": "aggregate_state_dicts match_state_dicts",
    "fedgram.bindings.distributed": "aggregate_sharded match_sharded Watch",
    "fedgram.bindings.streaming": "aggregate_directories aggregate_to_directory",
}
PARAMETERS = {
    "fedgram.flora_na.estimate": "B A weights scalings method rank anchor align_to",
    "fedgram.flora_na.aggregate": "adapters weights method rank shared anchor align_to missing residual "
    "backend progress",
    "fedgram.flora_na.client_gramian": "adapters weights",
    "fedgram.stamp.match": "gradients weights c backend",
    "fedgram.stamp.solve_dual": "gramian c weights",
    "fedgram.stamp.gramian": "gradients weights",
    "fedgram.stamp.ghost_gramian": "model loss_fn tasks",
    "fedgram.stamp.select_prototypes": "X y per_class restarts seed",
}


@pytest.mark.parametrize("module", CONTRACT)
def test_the_names_are_there_and_documented(module):
    imported = importlib.import_module(module)
    for name in CONTRACT[module].split():
        assert len(inspect.getdoc(getattr(imported, name)) or "") > 40, f"{module}.{name}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_are_there(name):
    module, function = name.rsplit(".", 1)
    found = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    assert set(PARAMETERS[name].split()) <= set(found)


@pytest.mark.parametrize("module", ["fedgram.kernels", "fedgram.flora_na", "fedgram.stamp"])
def test_all_lists_what_is_public(module):
    imported = importlib.import_module(module)
    for name in imported.__all__:
        assert inspect.getdoc(getattr(imported, name)), name


ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("_frameworks", "flower", "nvflare")
"""In the names of modules that need a library which only an extra brings; venvs of their own test them."""


def modules_in_the_sources():
    """Names of all modules as the sources have them: an installed package must have the same."""
    rooms = ("kernels", "flora_na", "stamp", "bindings", "bench")
    paths = [path.relative_to(ROOT) for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    names = [".".join(("fedgram", *path.parent.parts, path.stem)).removesuffix(".__init__") for path in paths]
    return [name for name in names if not any(word in name for word in FRAMEWORKS)]


@pytest.mark.parametrize("module", modules_in_the_sources())
def test_every_module_is_installed_and_can_be_imported(module):
    importlib.import_module(module)
