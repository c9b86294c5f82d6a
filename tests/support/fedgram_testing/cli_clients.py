"""Real client directories for the command line, and the command line run inside the test process."""

import shutil

import pytest
from typer.testing import CliRunner

from fedgram.bench._commands import app

from .peft_adapters import bert, peft_deltas, write_client

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANKS = (2, 3, 4)


@pytest.fixture(scope="module")
def deltas(tmp_path_factory):
    """Three clients of one classifier, of different ranks and scalings; with each, the updates that PEFT computes."""
    root = tmp_path_factory.mktemp("round")
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    found = []
    for i, r in enumerate(RANKS):
        model = write_client(
            root / f"c{i}",
            bert(),
            seed=i,
            r=r,
            lora_alpha=4 + i,
            use_rslora=i == 1,
            alpha_pattern={"query": 3},
            **options,
        )
        found.append(peft_deltas(model))
    return root, found


@pytest.fixture
def clients(deltas, tmp_path):
    """Fresh copies, to be damaged; their directories in order."""
    for i in range(len(RANKS)):
        shutil.copytree(deltas[0] / f"c{i}", tmp_path / f"c{i}")
    return [tmp_path / f"c{i}" for i in range(len(RANKS))]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments) -> str:
    """The one line with which a call is refused; nothing on stdout, no traceback."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    return line
