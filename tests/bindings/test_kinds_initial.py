"""Initialisations that change the base weights: with the initial factors given, the merged weights of PEFT itself."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

from fedgram import flora_na
from fedgram.bindings.peft import load_adapter, load_adapters, save_adapter
from fedgram.flora_na.screening import scaled
from fedgram_testing.peft_adapters import mlp, quietly

WEIGHTS = [1.0, 3.0]


def prepared(init):
    """The model and configuration, with what the initialisation wants to see first."""
    base, options = mlp(), {"r": 2, "lora_alpha": 3, "target_modules": ["0", "2"], "init_lora_weights": init}
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    if init == "corda":
        config = LoraConfig(corda_config=CordaConfig(corda_method="kpm"), **options)
        orient(base[0], x, config.r)
        orient(base[2], base[:2](x), config.r)
    elif init == "lora_ga":
        config = LoraConfig(lora_ga_config=LoraGAConfig(), **options)
        preprocess_loraga(base, config, lambda: base(x).square().mean().backward())
    else:
        config = LoraConfig(**options)
    return base, config


def orient(linear, x, r):
    """CorDA's context-oriented decomposition, ``W C = U S V'``, for PEFT's initialisation to find.

    PEFT's own function for it cannot be imported without a package that PEFT does not declare.
    """
    C = (x.T @ x / len(x)).detach() + 0.1 * torch.eye(x.shape[1])
    U, S, Vt = torch.linalg.svd(linear.weight.detach() @ C, full_matrices=False)
    linear.eigens = SimpleNamespace(U_WC=U[:, :r].clone(), S_WC=S[:r].clone(), V_WC=(torch.linalg.inv(C) @ Vt.T)[:, :r])


def merged(model) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in quietly(model.merge_and_unload).state_dict().items()}


def start(init) -> PeftModel:
    torch.manual_seed(7)  # lora_ga draws
    base, config = prepared(init)
    return get_peft_model(base, config)


@pytest.fixture(scope="module", params=["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def trained(request, tmp_path_factory):
    """The initial adapter and two trained clients on disk, and the clients' merged weights."""
    root, init = tmp_path_factory.mktemp("init"), request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = start(init)
        first.save_pretrained(str(root / "init"))
        weights = []
        for u in range(len(WEIGHTS)):
            model = start(init)
            generator = torch.Generator().manual_seed(u)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_" in name:
                        p += 0.1 * torch.randn(p.shape, generator=generator)
            model.save_pretrained(str(root / f"c{u}"))
            weights.append(merged(model))
    return root, init, weights


def test_the_aggregate_is_the_mean_of_the_clients_weights(trained, tmp_path):
    """Rank 2 r: what one client has. Two clients span 3 r, of which ``stack`` loses nothing."""
    root, _, weights = trained
    adapters = load_adapters([root / "c0", root / "c1"], init=root / "init")
    assert [layer.rank for layer in adapters[0].modules.values()] == [4, 4]
    save_adapter(flora_na.aggregate(adapters, WEIGHTS, method="stack").adapter, tmp_path / "out")
    found = merged(PeftModel.from_pretrained(mlp(), str(tmp_path / "out")))
    for name, tensor in found.items():
        expected = sum(w / sum(WEIGHTS) * one[name] for w, one in zip(WEIGHTS, weights, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
    assert flora_na.aggregate(adapters, WEIGHTS, method="svd").adapter.modules["0"].rank == 4


@pytest.mark.parametrize("method", flora_na.METHODS)
def test_one_client_comes_back_with_its_own_weights(trained, tmp_path, method):
    root, _, weights = trained
    adapter = load_adapter(root / "c0", init=root / "init")
    save_adapter(flora_na.aggregate([adapter], method=method).adapter, tmp_path / "out")
    for name, tensor in merged(PeftModel.from_pretrained(mlp(), str(tmp_path / "out"))).items():
        torch.testing.assert_close(tensor, weights[0][name], rtol=1e-5, atol=1e-5)


def test_the_sizes_are_told_without_reading(trained):
    root, *_ = trained
    [client] = quietly(load_adapters, [root / "c0"], init=root / "init")
    clipped = scaled(client, 0.5, {})
    for name, layer in client.modules.items():
        assert client.modules.sizes(name) == (*layer.B.shape[:1], *layer.A.shape[::-1])
        assert clipped.modules.sizes(name) == client.modules.sizes(name)


def test_without_the_initial_factors_it_is_refused(trained):
    root, init, _ = trained
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' is not supported without the initial factors"):
        load_adapter(root / "c0")


def test_an_initial_adapter_that_is_not_theirs_is_refused(tmp_path):
    def write(name, init="pissa", **options):
        config = LoraConfig(init_lora_weights=init, **{"r": 2, "lora_alpha": 3, "target_modules": ["0", "2"]} | options)
        quietly(get_peft_model, mlp(), config).save_pretrained(str(tmp_path / name))
        return tmp_path / name

    client = write("c")
    for options, reason in (
        ({"r": 3, "lora_alpha": 4.5}, "0: rank 2 differs from 3 of the initial adapter"),
        ({"lora_alpha": 4}, "0: scaling 1.5 differs from 2.0 of the initial adapter"),
        ({"target_modules": ["0"]}, "2: the initial adapter .* has no such module"),
    ):
        with pytest.raises(ValueError, match=reason):
            list(load_adapter(client, init=write("i", **options)).modules.values())
    with pytest.raises(ValueError, match="init_lora_weights olora differs from pissa of"):
        load_adapters([client, write("d", "olora")], init=write("i"))
