"""What is kept of the teacher: its likeliest words and the rest's share, and where it lies when memory is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from acckv import InputError
from lightning_modules.calibration import teacher_targets
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.losses import divergence
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.teacher_cache import GB, TeacherCache
from lightning_modules.calibration.teacher_targets import TeacherTargets
from lightning_modules.calibration.top_tokens import TopTokens


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


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
    for kind in ("forward", "reverse"):
        full, bound = (float(each.divergence(student, weight, kind)) for each in (whole, few))  # type: ignore[arg-type]
        assert full == pytest.approx(float(divergence(teacher, student, weight, kind)))  # type: ignore[arg-type]
        assert 0.98 * full < bound <= full
    assert (
        whole.likeliest(1.0) is whole
        and TeacherTargets(teacher[:, :1024], whole.outputs).likeliest(0.9).words.ndim == 2
    )  # type: ignore[union-attr]


def losses(cache: Path, **options: Any) -> tuple[list[float], Any]:
    """KL and loss of a first visit of two clips and of a second one, and the data."""
    module = CalibrationModule(lora_rank=0, feature_loss="attention")
    module.configure_model()
    data = AVDataModule(
        train_clips=6,
        validation_clips=2,
        batch_size=2,
        questions_per_clip=3,
        cache_dir=str(cache),
        cache="prefill",
        **options,
    )
    data.setup()
    dataset, found = data.datasets["validation"], []
    for visit in range(2):
        batch = dataset.collate([dataset[(index, visit)] for index in (0, 1)])
        assert (batch.targets is not None) == (visit == 1)
        done = module.distill(batch, 0.1, 0.1)
        found += [done.kl.item(), done.loss.item()]
    module.teardown("fit")
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
    kinds = [f"validation {kind} of 2 (" for kind in ("prefills", "targets", "outputs")]
    assert all(kind in said for kind in kinds) and said.count(" GB on disk)") == 3 and "memory)" not in said
    storage = data.datasets["validation"].cache
    assert storage._used == 0
    storage.clear("validation targets")
    assert not storage.has("validation targets", data.datasets["validation"].clips[0][0].clip)


def test_likeliest_words_train_nearly_as_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = losses(cache)
    monkeypatch.setattr(teacher_targets, "WHOLE", 0)
    for top_p, tolerance in ((0.999999, 1e-3), (0.9, 0.3)):
        found, data = losses(cache, teacher_top_p=top_p)
        assert found == pytest.approx(expected, rel=tolerance) and all(
            one <= other + 1e-5 for one, other in zip(found, expected, strict=True)
        )
        clip = data.datasets["validation"].clips[0][0].clip
        assert all(
            isinstance(words, TopTokens) for words in data.datasets["validation"].cache.get("validation targets", clip)
        )


def test_a_limit_is_of_all_kinds_together(tmp_path: Path) -> None:
    kept, shared = TeacherCache(100 * 4 / GB, tmp_path), torch.arange(60.0)
    kept.put("a", 1, [shared, {"twice": shared}])
    kept.put("b", 1, torch.ones(60))
    kept.put("b", 2, torch.ones(40))
    assert [kept._sizes[place] for place in (("a", 1), ("b", 1), ("b", 2))] == [
        *(("memory", 240), ("on disk", 240), ("memory", 160))
    ]
    first, second = kept.get("a", 1)
    assert first is second["twice"] and torch.equal(kept.get("b", 1), torch.ones(60))
    kept.clear("a")
    kept.put("b", 3, torch.ones(50))
    assert kept._sizes["b", 3][0] == "memory" and "b of 3 (" in kept.describe()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data\.cache_memory_gb: no room for what is kept of clips .* embeddings"):
        TeacherCache(0, tmp_path / "file").put("a", 1, torch.ones(3))
    for name, value in (("cache_memory_gb", -1.0), ("teacher_top_p", 0.0)):
        with pytest.raises(InputError, match=rf"data\.{name}: "):
            AVDataModule(**{name: value})
