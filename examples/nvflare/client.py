"""One site: MiniLM with LoRA on its own share of 20 Newsgroups. FLARE runs this file; ``job.py`` says with what.

The lines that concern federation are those with ``flare``; the rest is training as the site does it anyway.
"""

import argparse
from pathlib import Path

import numpy as np
import nvflare.client as flare
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from fedgram.bench.demo.clients import draw_batches, lora_config
from fedgram.bench.demo.minilm import HiddenStates, load_model, quiet
from fedgram.bench.demo.newsgroups import dirichlet_partition, load_split


def main() -> None:
    """Train round after round until the server is done."""
    options = arguments()
    flare.init()
    site = flare.get_site_name()  # "site-1", "site-2", ...
    number = int(site.rpartition("-")[2]) - 1

    messages = load_split("train")
    rng = np.random.default_rng(options.seed)
    own = rng.permutation(dirichlet_partition(messages.labels, options.sites, 0.3, rng, at_least=128)[number])
    judged, own = own[:64], own[64:]  # the server compares its models by the accuracy on the former
    model = load_model(len(messages.classes))
    hidden = HiddenStates(model, messages.texts, max_tokens=32)
    with quiet():
        adapted = get_peft_model(model, lora_config(options.rank)).eval()
    learnt = [p for p in adapted.parameters() if p.requires_grad]
    targets = torch.from_numpy(messages.labels)

    while flare.is_running():
        received = flare.receive()
        set_peft_model_state_dict(adapted, received.params)
        with torch.no_grad():
            right = model.upper(*hidden.batch(judged)).argmax(1) == targets[judged]
        optimizer = torch.optim.AdamW(learnt, lr=2e-3, weight_decay=0.0)
        batches = draw_batches(own, options.steps, 16, np.random.default_rng([received.current_round, number]))
        for batch in batches:
            loss = torch.nn.functional.cross_entropy(model.upper(*hidden.batch(batch)), targets[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if options.keep:  # what was sent, for `fedgram inspect` and for the tests
            with quiet():
                adapted.save_pretrained(str(Path(options.keep) / f"round-{received.current_round}" / site))
        sent = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(adapted).items()}
        weight = {"NUM_STEPS_CURRENT_ROUND": len(own)}  # the client's weight: here its number of messages
        flare.send(flare.FLModel(params=sent, metrics={"accuracy": float(right.double().mean())}, meta=weight))


def arguments() -> argparse.Namespace:
    """The options that ``job.py`` passes on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
