"""Fine-tune MiniLM on 20 Newsgroups over several sites in FLARE's simulator, aggregated by FLoRA-NA.

python job.py --rounds 3 --sites 4
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from nvflare.recipe import SimEnv
from safetensors.torch import save_file

from fedgram.bench.demo.clients import new_adapter, right_answers
from fedgram.bench.demo.minilm import HiddenStates, load_model
from fedgram.bench.demo.newsgroups import load_split
from fedgram.bindings.nvflare import FloraNAAggregator, FloraNARecipe

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Make the first adapter, run the job, write the global adapter and say what it is worth."""
    options = arguments()
    out = options.out.resolve()
    model = load_model(classes=20)
    new_adapter(model, options.rank, options.seed, out / "initial")

    recipe = FloraNARecipe(
        name="newsgroups",
        adapter=out / "initial",
        aggregator=FloraNAAggregator(method=options.method),
        min_clients=options.sites,
        num_rounds=options.rounds,
        train_script=str(HERE / "client.py"),
        train_args=f"--sites {options.sites} --rank {options.rank} --steps {options.steps} --seed {options.seed} "
        f"--keep {out / 'sent'}",
    )
    run = recipe.execute(SimEnv(num_clients=options.sites, workspace_root=str(out / "flare")))
    server = Path(run.get_result()) / "server" / "simulate_job" / "app_server"

    weights = torch.load(server / "FL_global_model.pt", weights_only=True)["model"]
    write_adapter(out / "initial", weights, out / "global")
    for file in sorted(server.glob("fedgram_round_*.json")):
        report = json.loads(file.read_text())
        shown = (f"{key} {report[key]:.4f}" for key in ("rho", "rho_fedavg", "rho_optimal"))
        print(f"{file.stem}: {', '.join(shown)}")
    test = load_split("test")
    indices = np.random.default_rng(0).choice(len(test.labels), options.test, replace=False)
    right = right_answers(model, out / "global", indices, HiddenStates(model, test.texts, 32), test.labels)
    print(f"accuracy of {out / 'global'} on {options.test} test messages: {right.mean():.3f}")


def write_adapter(like: Path, weights: dict[str, torch.Tensor], path: Path) -> None:
    """The weights as an adapter directory of PEFT, with the configuration that the clients trained with."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(like / "adapter_config.json", path / "adapter_config.json")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "adapter_model.safetensors")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="als", help="fedavg, flora-na, als or svd")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--test", type=int, default=500, help="test messages, of 7,528")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out-nvflare"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
