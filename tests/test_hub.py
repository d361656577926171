"""Hub ids: a model and an export are found in a cache of the hub's own layout, without a network.

The cache lies in a temporary folder; what a download would have put there is built by hand.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from acckv import CompressionConfig, InputError, KVCompressor
from acckv.adapters import find_adapter, load_model
from acckv.tiny import TINY_MODEL
from acckv.weights import CalibratedWeights
from tests import checkpoints

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(cache: Path, name: str, source: Path) -> None:
    """A repository as `huggingface_hub` keeps it: blobs, a snapshot of links to them, and main's commit."""
    repository = cache / f"models--{name.replace('/', '--')}"
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


def total(tensors: object) -> float:
    return sum(float(tensor.detach().double().abs().sum()) for tensor in tensors)


def test_hub_ids_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    model, _ = load_model("tiny")
    sizes = find_adapter(model).dimensions
    weights = CalibratedWeights(sizes["layers"], sizes["kv_heads"], sizes["query_heads"], sizes["head_size"], 4)
    compressor = KVCompressor(CompressionConfig.preset("context"), weights, base={"name": "tiny", **sizes})
    compressor.save_pretrained(tmp_path / "export")
    decoder = checkpoints.decoder(tmp_path / "decoder")
    put(cache, "org/tiny-av-llm", TINY_MODEL)
    put(cache, "org/decoder", decoder)
    put(cache, "org/compressor", tmp_path / "export")
    # What HF_HUB_CACHE and HF_HUB_OFFLINE set when the hub's library is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    found, processor = load_model("org/tiny-av-llm")
    assert type(found) is type(model) and type(processor).__name__ == "Qwen2_5OmniProcessor"
    assert total(found.parameters()) == total(model.parameters())
    plain, text = load_model("org/decoder")
    assert (type(plain).__name__, type(text).__name__) == ("Qwen2ForCausalLM", "TextProcessor")
    assert total(plain.parameters()) == total(load_model(decoder)[0].parameters())
    loaded = KVCompressor.from_pretrained("org/compressor").with_ratio(0.1)
    assert loaded.name == "acckv-calibrated" and loaded.weights is not None
    assert total(loaded.weights.parameters()) == total(weights.parameters())
    with loaded(found):
        pass
    with pytest.raises(InputError, match=r"^org/absent: cannot be loaded: "):
        load_model("org/absent")
    with pytest.raises(InputError, match=r"^org/absent: is neither a folder nor a hub repository that can be reached$"):
        KVCompressor.from_pretrained("org/absent")
