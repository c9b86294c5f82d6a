"""Where the STAMP demo has its images from: a Debian package, unpacked and checked, or one line that says why not."""

import gzip
import os
import shutil
import subprocess

import numpy as np
import pytest

from fedgram.bench.data import FetchError
from fedgram.bench.demo import stamp_data

PACKAGES = shutil.which("dpkg-deb") is not None


@pytest.mark.skipif(not PACKAGES, reason="dpkg-deb is not here")
def test_a_debian_package_is_unpacked_and_checked(tmp_path, monkeypatch):
    # A real package with the real layout and two images a split, brought by an apt-get that copies it.
    source = tmp_path / "tree"
    (source / stamp_data.FOLDER).mkdir(parents=True)
    (source / "DEBIAN").mkdir()
    control = f"Package: {stamp_data.PACKAGE}\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: test\n"
    (source / "DEBIAN/control").write_text(control)
    digests = {}
    for name in stamp_data.FILES:
        content = bytes(16 + 2 * 784) if "images" in name else bytes(8) + bytes([3, 9])
        (source / stamp_data.FOLDER / f"{name}.gz").write_bytes(gzip.compress(content))
        digests[name] = stamp_data.hashlib.sha256(content).hexdigest()
    built = tmp_path / f"{stamp_data.PACKAGE}_1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", source, built], check=True, capture_output=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text(f'#!/bin/sh\n[ "$1 $2" = "download {stamp_data.PACKAGE}" ] && cp {built} .\n')
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FEDGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stamp_data, "FILES", digests)
    monkeypatch.setattr(stamp_data, "INSTALLED", tmp_path / "nowhere")
    found = stamp_data.load_images("fashion-mnist")
    assert found.train[0].shape == (2, 1, 28, 28)
    assert found.test[1].tolist() == [3, 9]
    (tools / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    assert stamp_data.load_images("fashion-mnist").train[1].tolist() == [3, 9]  # from the cache
    monkeypatch.setattr(stamp_data, "FILES", dict.fromkeys(digests, "0" * 64))
    with pytest.raises(FetchError, match=r"has sha256 .* expected 0000"):
        stamp_data.load_images("fashion-mnist")


def test_a_damaged_archive_is_one_line(tmp_path):
    whole = bytearray(gzip.compress(np.random.default_rng(0).integers(0, 50, 200_000, dtype=np.uint8).tobytes()))
    whole[2000:2100] = bytes(b ^ 0xFF for b in whole[2000:2100])  # zlib's own error, before any check sum
    (tmp_path / "images.gz").write_bytes(whole)
    with pytest.raises(FetchError, match=r"cannot read .*images\.gz: Error -3"):
        stamp_data._unpacked(tmp_path / "images.gz", "0" * 64)


def test_a_package_that_cannot_be_had_says_why(tmp_path, monkeypatch):
    (tmp_path / "dpkg-deb").write_text("#!/bin/sh\n")
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    monkeypatch.setenv("FEDGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stamp_data, "INSTALLED", tmp_path / "nowhere")
    monkeypatch.setattr(stamp_data, "_mnist", lambda why: why)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="dataset-fashion-mnist needs apt-get, which is not here"):
        stamp_data.load_images("fashion-mnist")
    for tool in ("apt-get", "dpkg-deb"):
        (tmp_path / tool).chmod(0o755)
    with pytest.raises(FetchError, match="apt-get download dataset-fashion-mnist failed: E: Unable to locate package"):
        stamp_data.load_images("fashion-mnist")
    assert "Unable to locate" in stamp_data.load_images("auto")
    assert not any((tmp_path / "cache/unpacked").iterdir())
    with pytest.raises(ValueError, match="dataset: expected auto"):
        stamp_data.load_images("cifar")
