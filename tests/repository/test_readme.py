"""Every Python example of the README and of the page on sessions runs, in order, as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acckv import CompressionConfig, KVCompressor
from acckv.data.encoding import encode
from acckv.data.media import read_media
from acckv.method.weights import CalibratedWeights
from acckv.models import find_adapter, load_model
from tests.data.media_files import write_video
from tests.families import FAMILIES
from tests.paths import ROOT

README = ROOT / "README.md"
PAGES = ("sessions.md", "media.md")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_python_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sound = np.sin(np.arange(6 * 16_000) / 20).astype(np.float32)[None]
    write_video(Path("clip.mp4"), [0.0, 1.0, 2.5, 4.0, 5.9], [40, 90, 140, 190, 40], sound, size=(84, 84))
    model, processor = load_model("tiny")
    sizes = find_adapter(model).dimensions
    config = CompressionConfig.preset("context")
    weights = CalibratedWeights(sizes["layers"], sizes["kv_heads"], sizes["query_heads"], sizes["head_size"], 4)
    KVCompressor(config, weights, base={"name": "tiny", **sizes}).save_pretrained("runs/calib/export")
    decoder = FAMILIES["videollama2"].build()
    names: dict[str, Any] = {
        "model": model,
        "processor": processor,
        "encode": encode,
        "clip": read_media("clip.mp4"),
        "inputs": encode(processor, [read_media("clip.mp4")], ["what colour ?"]),
        "decoder": decoder,
        "embed": decoder.get_input_embeddings(),
        "prompt_ids": torch.tensor([[2, 10]]),
        "question_ids": torch.tensor([[20, 21]]),
        "video_features": torch.randn(1, 30, 64),
        "audio_features": torch.randn(1, 10, 64),
    }
    blocks = [block for page in (README, *map((ROOT / "docs").joinpath, PAGES)) for block in python_blocks(page)]
    assert len(blocks) == 8
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), names)
        if "budget=64" in block:
            assert [layer.physical for layer in names["cache"].layers] == [64] * sizes["layers"]
    assert names["output"].shape == (1, 64)
    assert len(capsys.readouterr().out.splitlines()) == 2  # the two answers of the second example
    assert isinstance(names["text"], str) and not names["thread"].is_alive()
