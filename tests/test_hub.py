"""Hub ids: a model and an export are found in a cache of the hub's own layout, without a network.

The cache lies in a temporary folder; what a download would have put there is built by hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from acckv import CompressionConfig, KVCompressor
from acckv.adapters import find_adapter, load_model
from acckv.tiny import TINY_MODEL
from acckv.weights import CalibratedWeights
from tests import checkpoints

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import torch
from acckv import InputError, KVCompressor
from acckv.adapters import load_model

def total(tensors):
    return sum(float(tensor.detach().double().abs().sum()) for tensor in tensors)

for name in ("org/tiny-av-llm", "org/decoder"):
    model, processor = load_model(name)
    print(type(model).__name__, type(processor).__name__, total(model.parameters()))
compressor = KVCompressor.from_pretrained("org/compressor").with_ratio(0.1)
print(compressor.name, total(compressor.weights.parameters()))
with compressor(load_model("org/tiny-av-llm")[0]):
    print("fits")
for load in (load_model, KVCompressor.from_pretrained):
    try:
        load("org/absent")
    except InputError as error:
        print(error)
"""


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


def test_hub_ids_are_resolved(tmp_path: Path) -> None:
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
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{type(model).__name__} Qwen2_5OmniProcessor {total(model.parameters())}"
    assert lines[1] == f"Qwen2ForCausalLM TextProcessor {total(load_model(decoder)[0].parameters())}"
    assert lines[2] == f"acckv-calibrated {total(weights.parameters())}"
    assert lines[3] == "fits"
    assert lines[4].startswith("org/absent: cannot be loaded: ")
    assert lines[5] == "org/absent: is neither a folder nor a hub repository that can be reached"
