"""Memories of earlier tasks for the temporal matcher."""

from typing import Any


class OneTask:
    """Holds one batch, as it is, of one earlier task."""

    tasks = ("old",)

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def task(self, name: str) -> Any:
        return self.batch
