"""What a job says of the aggregator and of the first model, and what the server makes of it."""

import json
import warnings
from dataclasses import asdict, dataclass, field

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="runs in the venv of the extra 'nvflare'")

with warnings.catch_warnings():  # what FLARE warns of while it is imported is FLARE's to mend
    warnings.simplefilter("ignore")
    from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
    from nvflare.fuel.utils.component_builder import ComponentBuilder

    from fedgram.bindings.nvflare import AdapterModel, FloraNAAggregator, FloraNARecipe, StampAggregator, StampRecipe
    from fedgram_testing.nvflare_rounds import adapters, aggregated, models, same

from safetensors.torch import save_file


@dataclass
class Config:
    """A stand-in for ``peft.LoraConfig``, whose ``to_dict`` gives sets, too."""

    r: int
    lora_alpha: int
    peft_type: str = "LORA"
    target_modules: set = field(default_factory=lambda: {"v", "q"})

    def to_dict(self):
        return asdict(self)


@pytest.mark.parametrize(
    "config",
    [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8, "target_modules": {"q", "v"}}, Config(r=4, lora_alpha=8)],
    ids=["plain", "with a set", "object"],
)
def test_a_job_names_the_aggregator_and_the_server_builds_it_again(config, tmp_path):
    script = tmp_path / "client.py"
    script.write_text("")
    save_file(adapters()[0], tmp_path / "adapter_model.safetensors")
    aggregator = FloraNAAggregator("svd", rank=4, config=config, align_previous=True, output_scaling=np.float32(2))
    recipe = FloraNARecipe(
        name="named", adapter=tmp_path, aggregator=aggregator, min_clients=2, train_script=str(script)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe.export(str(tmp_path / "jobs"))
    configs = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "jobs" / "named").rglob("config_fed_server.json"))
    ]
    assert len(configs) == 1
    assert not list((tmp_path / "jobs").rglob("flora_na"))  # the library is installed on the server, not shipped
    [workflow] = configs[0]["workflows"]
    described = workflow["args"]["aggregator"]

    class Builder(ComponentBuilder):
        def get_module_scanner(self):
            return None

    built = Builder().build_component(described)
    assert type(built) is FloraNAAggregator
    assert vars(built).keys() == vars(aggregator).keys()
    for name in ("method", "rank", "config", "align_previous", "output_scaling", "weighted_by", "report"):
        assert getattr(built, name) == getattr(aggregator, name)
    [persistor] = [c for c in configs[0]["components"] if c["id"] == "persistor"]
    model = Builder().build_component(persistor["args"]["model"])
    assert type(model) is AdapterModel
    assert same(model.state_dict(), adapters()[0])
    assert aggregated(built, models(adapters(2)), start=adapters()[0]).meta["fedgram"]["method"] == "svd"


@pytest.mark.parametrize(
    ("recipe", "aggregator", "expected"),
    [
        (FloraNARecipe, FloraNAAggregator(clip=np.float32(2)), {"clip": 2.0}),
        (
            FloraNARecipe,
            FloraNAAggregator(clip=np.array(2.0), align_previous=np.bool_(True), report=np.bool_(False)),
            {"clip": 2.0, "align_previous": True, "report": False},
        ),
        (
            FloraNARecipe,
            FloraNAAggregator(
                "flora-na",
                shared=np.array(True),
                output_scaling={"q": np.float32(2)},
                config={"r": 4, "lora_alpha": 8, "use_dora": np.bool_(False)},
            ),
            {
                "method": "flora-na",
                "shared": True,
                "output_scaling": {"q": 2.0},
                "config": {"r": 4, "lora_alpha": 8, "use_dora": False},
            },
        ),
        (StampRecipe, StampAggregator(precise=np.bool_(False)), {"precise": False}),
        (StampRecipe, StampAggregator(c=np.float32(0.5), lr=torch.tensor(2)), {"c": 0.5, "lr": 2.0}),
    ],
)
def test_numbers_of_other_libraries_travel_with_the_job(recipe, aggregator, expected, tmp_path):
    (tmp_path / "client.py").write_text("")
    # by name, since FLARE looks through the source of an object's library
    model = {"class_path": "torch.nn.Linear", "args": {"in_features": 1, "out_features": 1}}
    job = {"name": "job", "min_clients": 2, "train_script": str(tmp_path / "client.py")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe(model=model, aggregator=aggregator, **job).export(str(tmp_path / "jobs"))
    [path] = tmp_path.rglob("config_fed_server.json")
    [workflow] = json.loads(path.read_text())["workflows"]
    assert workflow["args"]["aggregator"]["args"] == expected


JOB = {"min_clients": 2, "train_script": __file__}


def test_a_recipe_wants_one_first_model(tmp_path):
    with pytest.raises(ValueError, match="adapter: give this, model or model_persistor"):
        FloraNARecipe(**JOB)
    persistor = PTFileModelPersistor(model=torch.nn.Linear(2, 2))
    for other in ({"model": torch.nn.Linear(2, 2)}, {"model_persistor": persistor}):
        with pytest.raises(ValueError, match=f"adapter: give this or {next(iter(other))}, not both"):
            FloraNARecipe(adapter=tmp_path, **other, **JOB)
    for recipe in (FloraNARecipe, StampRecipe):
        assert recipe(model_persistor=persistor, **JOB).model_persistor is persistor


@pytest.mark.parametrize("recipe", [FloraNARecipe, StampRecipe])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"aggregation_weights": {"site-1": 9.0}}, "aggregation_weights: FLARE heeds it .* weighted_by"),
        ({"exclude_vars": "head"}, "exclude_vars: FLARE heeds it .* let the clients leave out"),
    ],
)
def test_options_that_flare_would_not_hand_on_are_refused(recipe, option, message):
    with pytest.raises(ValueError, match=message):
        recipe(model=torch.nn.Linear(2, 2), **option, **JOB)


@pytest.mark.parametrize(
    "key",
    ["path.lora_A.weight", "base_model.modules.0.lora_A.weight", "x.type.lora_A", "x.forward", "training.weight", "x."],
)
def test_modules_of_any_name_come_out_as_they_stand_in_the_file(key, tmp_path):
    save_file({key: torch.ones(2, 3), "other": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    model = AdapterModel(str(tmp_path))
    assert same(model.state_dict(), {key: torch.ones(2, 3), "other": torch.zeros(1)})
    model.load_state_dict({key: torch.zeros(2, 3), "other": torch.ones(1)})
    assert same(model.state_dict(), {key: torch.zeros(2, 3), "other": torch.ones(1)})


@pytest.mark.parametrize("content", [None, b"", b"x" * 16, b"\x08\0\0\0\0\0\0\0not json"])
def test_a_file_that_cannot_be_read_is_an_error_of_the_system(content, tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        AdapterModel(str(tmp_path))
