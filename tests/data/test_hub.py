"""Hub ids: a model, an export and benchmarks are found in a cache of the hub's own layout, without a network.

The cache lies in a temporary folder; what a download would have put there is built by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet
from torch import Tensor

from acckv import InputError, KVCompressor
from acckv.benchmarks import load_benchmark
from acckv.data.records import Record
from acckv.models import load_model
from acckv.models.loading import TINY_MODEL
from tests import checkpoints
from tests.learned import calibrated, weights_of
from tests.paths import FIXTURES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(cache: Path, name: str, source: Path, kind: str = "models") -> None:
    """A repository as `huggingface_hub` keeps it: blobs, a snapshot of links to them, and main's commit."""
    repository = cache / f"{kind}--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = snapshot / file.relative_to(source)
        blob = repository / "blobs" / f"{len(list(repository.glob('blobs/*'))):064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def total(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.detach().double().abs().sum()) for tensor in tensors)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, offline, and an empty cache of ours."""
    # What HF_HUB_CACHE and HF_HUB_OFFLINE set when the hub's library is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ACCKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_hub_ids_are_resolved(tmp_path: Path, cache: Path) -> None:
    model, _ = load_model("tiny")
    compressor = calibrated(model)
    compressor.save_pretrained(tmp_path / "export")
    learned = total(weights_of(compressor).parameters())
    decoder = checkpoints.decoder(tmp_path / "decoder")
    put(cache, "org/tiny-av-llm", TINY_MODEL)
    put(cache, "org/decoder", decoder)
    put(cache, "org/compressor", tmp_path / "export")
    found, processor = load_model("org/tiny-av-llm")
    assert type(found) is type(model) and type(processor).__name__ == "Qwen2_5OmniProcessor"
    assert total(found.parameters()) == total(model.parameters())
    plain, text = load_model("org/decoder")
    assert (type(plain).__name__, type(text).__name__) == ("Qwen2ForCausalLM", "TextProcessor")
    assert total(plain.parameters()) == total(load_model(decoder)[0].parameters())
    loaded = KVCompressor.from_pretrained("org/compressor").with_ratio(0.1)
    assert loaded.name == "acckv-calibrated" and total(weights_of(loaded).parameters()) == learned
    pinned = KVCompressor.from_pretrained(f"org/compressor@{COMMIT}")
    assert total(weights_of(pinned).parameters()) == learned
    with loaded(found):
        pass
    with pytest.raises(InputError, match=r"^org/absent: cannot be loaded: "):
        load_model("org/absent")
    with pytest.raises(InputError, match=r"^org/absent: is neither a folder nor a hub repository that can be reached$"):
        KVCompressor.from_pretrained("org/absent")


def daily_omni(folder: Path) -> None:
    """Questions, and all videos in a tar."""
    shutil.copy(FIXTURES / "daily_omni/qa.json", folder)
    shutil.make_archive(str(folder / "Videos"), "tar", FIXTURES / "daily_omni", "Videos")


def worldsense(folder: Path) -> None:
    """Questions, and bare videos in several zips."""
    shutil.copy(FIXTURES / "worldsense/worldsense_qa.json", folder)
    for number, video in enumerate(sorted((FIXTURES / "worldsense/videos").iterdir())):
        shutil.make_archive(str(folder / f"worldsense_videos_{number}"), "zip", video.parent, video.name)


def video_mme(folder: Path) -> None:
    """Questions in a parquet file, and parts of the folder of videos in zips."""
    shutil.copytree(FIXTURES / "video_mme/videomme", folder / "videomme")
    for number, video in enumerate(sorted((FIXTURES / "video_mme/data").iterdir())):
        shutil.make_archive(
            str(folder / f"videos_chunked_{number:02d}"), "zip", FIXTURES / "video_mme", f"data/{video.name}"
        )


def mvbench(folder: Path) -> None:
    """Questions, and an archive beside each other of the folders of videos."""
    shutil.copytree(FIXTURES / "mvbench/json", folder / "json")
    (folder / "video").mkdir()
    for videos in sorted((FIXTURES / "mvbench/video").iterdir()):
        shutil.make_archive(str(folder / "video" / videos.name), "zip", videos.parent, videos.name)


def omnibench(folder: Path) -> None:
    """Questions and media in a parquet file."""
    source = FIXTURES / "omnibench"
    lines = (source / "dataset/batch-5_1142_20240817.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        for kind in ("image", "audio"):
            file = source / "mm_data" / kind / row[f"{kind}_path"]
            row[kind] = {"bytes": file.read_bytes(), "path": file.name}
    (folder / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data/train-00000-of-00001.parquet")


def av_odyssey(folder: Path) -> None:
    shutil.copytree(FIXTURES / "av_odyssey", folder, dirs_exist_ok=True)


@pytest.mark.parametrize("layout", [daily_omni, worldsense, video_mme, mvbench, omnibench, av_odyssey])
def test_benchmarks_of_the_hub_are_those_of_the_authors_folder(layout: Any, tmp_path: Path, cache: Path) -> None:
    name = layout.__name__
    (tmp_path / "source").mkdir()
    layout(tmp_path / "source")
    put(cache, f"org/{name}", tmp_path / "source", kind="datasets")
    ours, theirs = load_benchmark(name, f"org/{name}"), load_benchmark(name, FIXTURES / name)
    assert [replace(record, video=Path(), audio=None, attachments=()) for record in ours] == [
        replace(record, video=Path(), audio=None, attachments=()) for record in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        for mine, its in zip(media_of(one), media_of(other), strict=True):
            assert mine.is_file() == its.is_file()
            assert not its.is_file() or mine.read_bytes() == its.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert load_benchmark(name, f"org/{name}@main") == ours
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def media_of(record: Record) -> list[Path]:
    return [record.video, *([record.audio] if record.audio else []), *record.attachments]


def test_what_the_hub_does_not_have_or_is_broken_is_said(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"^org/absent: is neither a folder nor a data set of the hub that can be re"):
        load_benchmark("daily_omni", "org/absent")
    with pytest.raises(InputError, match=r"^a/b/c: no such folder, and no hub id \(org/name\)$"):
        load_benchmark("daily_omni", "a/b/c")
    (tmp_path / "source").mkdir()
    daily_omni(tmp_path / "source")
    archive = tmp_path / "source/Videos.tar"
    archive.write_bytes(archive.read_bytes()[:5000])
    put(cache, "org/broken", tmp_path / "source", kind="datasets")
    with pytest.raises(InputError, match=r"Videos\.tar: cannot be unpacked \(.*; is it cut off\?$"):
        load_benchmark("daily_omni", "org/broken")
    assert not list((tmp_path / "cache/hub/org--broken").iterdir())


def test_archives_do_not_write_outside_their_folder(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "source").mkdir()
    daily_omni(tmp_path / "source")
    with tarfile.open(tmp_path / "source/more.tar", "w") as archive:
        archive.add(FIXTURES / "daily_omni/qa.json", "../../../../stolen.json")
    put(cache, "org/outside", tmp_path / "source", kind="datasets")
    with pytest.raises(InputError, match=r"more\.tar: cannot be unpacked"):
        load_benchmark("daily_omni", "org/outside")
    assert not list(tmp_path.rglob("stolen.json"))
