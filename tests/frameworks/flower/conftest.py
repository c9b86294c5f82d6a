"""These tests need Flower, in a virtual environment of its own (the extra ``flower``); elsewhere none is collected."""

import os
import warnings
from importlib.util import find_spec

import pytest

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before flwr is imported, which reads it once
collect_ignore_glob = [] if find_spec("flwr") else ["test_*.py"]

if find_spec("flwr"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own dependencies warn of one another
        import flwr.serverapp.strategy  # noqa: F401


@pytest.fixture(scope="module")
def in_a_run():
    """Messages carry the identity of their run, which Flower's runtime sets."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
