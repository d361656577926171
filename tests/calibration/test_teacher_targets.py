"""What is kept of the teacher: its likeliest words and the rest's share, and where it lies when memory is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from acckv import InputError
from lightning_modules.calibration import losses as calibration_losses
from lightning_modules.calibration.clip_cache import GB, ClipCache
from lightning_modules.calibration.config import Divergence
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.losses import TeacherTargets, TopTokens, divergence
from tests.calibration.runs import clip_data, configured


def bucketed(p: list[float], q: list[float], held: list[int]) -> float:
    """KL(P || Q) with all but `held` as one, number by number."""
    pairs = [(p[token], q[token]) for token in held]
    left = [token for token in range(len(p)) if token not in held]
    if left:
        pairs.append((sum(p[token] for token in left), sum(q[token] for token in left)))
    return sum(one * float(torch.tensor(one / other).log()) for one, other in pairs)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999, 1.0])
def test_the_bucketed_divergence(top_p: float) -> None:
    """Its numbers, the bound that it is, and the full KL where all is held; both ways round, with gradients."""
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    teacher[1] = 0  # flat: nearly every word is needed
    top, logits = TopTokens.of(teacher, top_p), student.float().requires_grad_()
    p, q = teacher.softmax(-1), student.softmax(-1)
    order = p.argsort(dim=-1, descending=True)
    for row in range(5):
        covered = p[row, order[row]].cumsum(0)
        expected = min(int((covered < top_p - 1e-6).sum()) + 1, 11)
        assert int(top.counts[row]) == expected or top_p == 1.0
        held = order[row, : int(top.counts[row])].tolist()
        one = top.cut(row, row + 1)
        assert set(one.ids.tolist()) == set(held) or row == 1
        held = one.ids.tolist()
        for reverse, (a, b) in ((False, (p, q)), (True, (q, p))):
            found = one.divergence(logits[row : row + 1], reverse)
            assert float(found) == pytest.approx(bucketed(a[row].tolist(), b[row].tolist(), held), abs=1e-5)
            full = float((a[row] * (a[row] / b[row]).log()).sum())
            assert float(found) <= full + 1e-5 and (top_p < 1 or float(found) == pytest.approx(full, abs=1e-5))
    for reverse in (False, True):
        together = top.divergence(logits, reverse)
        (gradient,) = torch.autograd.grad(together.sum(), logits)
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-3
        alone = torch.cat([top.cut(row, row + 1).divergence(logits[row : row + 1], reverse) for row in range(5)])
        torch.testing.assert_close(together, alone)


def test_it_holds_little_of_a_large_vocabulary_and_misses_little() -> None:
    torch.manual_seed(0)
    teacher = 6 * torch.randn(40, 20_000)
    student, weight = teacher + 0.3 * torch.randn_like(teacher), torch.rand(40)
    whole = TeacherTargets(teacher, torch.zeros(0, 40, 0))
    few = whole.likeliest(0.999)
    assert isinstance(few.words, TopTokens)
    held = sum(part.nbytes for part in (few.words.ids, few.words.log_probs, few.words.counts, few.words.rest))
    assert held < teacher.nbytes / 10
    for kind in get_args(Divergence):
        full, bound = (float(each.divergence(student, weight, kind)) for each in (whole, few))
        assert full == pytest.approx(float(divergence(teacher, student, weight, kind)))
        assert 0.98 * full < bound <= full
    small = TeacherTargets(teacher[:, :1024], whole.features)
    assert whole.likeliest(1.0) is whole and isinstance(small.likeliest(0.9).words, torch.Tensor)


def losses(cache: Path, **options: Any) -> tuple[list[float], AVDataModule]:
    """KL and loss of a first visit of two clips and of a second one, and the data."""
    data = clip_data(cache, questions_per_clip=3, cache="prefill", **options)
    data.setup()
    dataset, found = data.datasets["validation"], []
    with configured(lora_rank=0, feature_loss="attention") as module:
        module.clip_cache = data.clip_cache
        for visit in range(2):
            batch = dataset.batch(visit, [0, 1], read=visit == 0)
            assert data.clip_cache.has("targets", batch.clips) == (visit == 1)
            done = module.distill(batch, 0.1, 0.1)
            found += [done.kl.item(), done.loss.item()]
    return found, data


def test_what_lies_on_disk_is_what_was_in_memory(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = losses(cache)
    assert "Kept of clips: validation prefills of 2 (0.00" in capsys.readouterr().out
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    on_disk, data = losses(cache, cache_memory_gb=0.0)
    assert on_disk == expected
    assert list(tmp_path.iterdir()) == [], "files without a name"
    said = capsys.readouterr().out
    assert f"0 GB of data.cache_memory_gb are full: what else is kept of clips goes to files in {tmp_path}." in said
    kinds = [f"validation {kind} of 2 (" for kind in ("prefills", "targets")]
    assert all(kind in said for kind in kinds) and said.count(" GB on disk)") == 2 and "memory)" not in said
    clips = data.datasets["validation"].names([0])
    assert data.clip_cache._used == 0 and data.clip_cache.has("targets", clips)
    data.clip_cache.forget_targets()
    assert not data.clip_cache.has("targets", clips) and data.clip_cache.holds(clips)


def test_likeliest_words_train_nearly_as_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = losses(cache)
    monkeypatch.setattr(calibration_losses, "WHOLE", 0)
    for top_p, tolerance in ((0.999999, 1e-3), (0.9, 0.3)):
        found, data = losses(cache, teacher_top_p=top_p)
        assert found == pytest.approx(expected, rel=tolerance) and all(
            one <= other + 1e-5 for one, other in zip(found, expected, strict=True)
        )
        (kept,) = data.clip_cache.get("targets", data.datasets["validation"].names([0]))
        assert kept and all(isinstance(each.words, TopTokens) for each in kept)


def test_a_limit_is_of_all_kinds_together(tmp_path: Path) -> None:
    kept, shared = ClipCache("prefill", limit=100 * 4 / GB, folder=tmp_path), torch.arange(60.0)
    one, two, three = clips = [("train", (Path(name), None, None, None, (), None)) for name in "abc"]
    kept.put("prefills", [one], [[shared, {"twice": shared}]])
    kept.put("targets", [one, two], [torch.ones(60), torch.ones(40)])
    sizes = [kept._held[key][1:] for key in (("prefills", one), ("targets", one), ("targets", two))]
    assert sizes == [("memory", 240), ("on disk", 240), ("memory", 160)] and kept._used == 400
    (found,), (far,) = kept.get("prefills", [one]), kept.get("targets", [one])
    assert found[0] is found[1]["twice"] and torch.equal(far, torch.ones(60))
    assert kept.has("targets", [one, two]) and not kept.has("targets", clips) and kept.holds([one])
    kept.put("prefills", [one], [torch.ones(2)])  # in place of what was there
    kept.put("targets", [three], [torch.ones(50)])
    assert kept._held["targets", three][1:] == ("memory", 200) and "train targets of 3 (" in kept.describe()
    assert kept._used == 8 + 160 + 200 and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data\.cache_memory_gb: no room for what is kept of clips .* embeddings"):
        ClipCache(limit=0, folder=tmp_path / "file").put("targets", [one], [torch.ones(3)])
    for name, value in (("cache_memory_gb", -1.0), ("teacher_top_p", 0.0)):
        with pytest.raises(InputError, match=rf"data\.{name}: "):
            AVDataModule(**{name: value})
