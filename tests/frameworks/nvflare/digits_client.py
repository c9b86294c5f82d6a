"""A site of the STAMP test: a small network on its own half of scikit-learn's digits. FLARE runs this file."""

import argparse
from pathlib import Path

import nvflare.client as flare
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from fedgram_testing.digits import Digits


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep")
    keep = Path(parser.parse_args().keep)
    flare.init()
    site = flare.get_site_name()
    digits = load_digits()
    mine = (digits.target % 2) == (site == "site-1")  # one site knows the odd digits only, the other the even ones
    X, y = torch.tensor(digits.data[mine] / 16.0).to(torch.bfloat16), torch.tensor(digits.target[mine])
    model = Digits()
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        save_file(received.params, keep / f"start-{received.current_round}-{site}.safetensors")
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(X), y).backward()
            optimizer.step()
        sent = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(sent, keep / f"sent-{received.current_round}-{site}.safetensors")
        meta = {"NUM_STEPS_CURRENT_ROUND": len(y)}
        flare.send(flare.FLModel(params=sent, metrics={"accuracy": 0.5, "site": site}, meta=meta))


if __name__ == "__main__":
    main()
