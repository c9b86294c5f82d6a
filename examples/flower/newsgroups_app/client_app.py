"""A client: take up the global adapter, train it on the own messages, send it back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedgram.bench.demo.clients import lora_config
from fedgram.bindings.flower import lora_record, to_arrays, to_state_dict

from .task import LOCAL_TEST, Task, load_task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of a client."""
    run, task, own = context.run_config, *_task(context)
    round_ = int(message.content["config"]["server-round"])
    task.load(to_state_dict(message.content["arrays"]))
    loss = task.train(own, int(run["steps"]), int(run["batch-size"]), float(run["learning-rate"]), round_)
    adapter = task.adapter()
    if run["bfloat16"]:
        adapter = {name: tensor.to(torch.bfloat16) for name, tensor in adapter.items()}
    figures = {"num-examples": len(own), "train-loss": loss}
    if run["output"]:
        task.load(adapter)  # what is saved is what is sent
        task.model.save_pretrained(str(_folder(context, round_)))
        (_folder(context, round_) / "figures.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    reply = RecordDict(
        {
            "arrays": to_arrays(adapter, pack_bf16=True),
            "metrics": MetricRecord(figures),
            "lora": lora_record(lora_config(int(run["rank"]))),
        }
    )
    return Message(content=reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """How many of the first of its own messages the client's model classifies right with the global adapter."""
    task, own = _task(context)
    task.load(to_state_dict(message.content["arrays"]))
    judged = own[:LOCAL_TEST]
    metrics = MetricRecord({"num-examples": len(judged), "own-accuracy": task.accuracy(judged)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def _task(context: Context) -> tuple[Task, list[int]]:
    run, node = context.run_config, context.node_config
    task = load_task("train", *(int(run[key]) for key in ("train-messages", "rank", "max-tokens", "seed")))
    return task, task.part(int(node["partition-id"]), int(node["num-partitions"]))


def _folder(context: Context, round_: int) -> Path:
    return Path(str(context.run_config["output"])) / f"round-{round_}" / f"client-{context.node_config['partition-id']}"
