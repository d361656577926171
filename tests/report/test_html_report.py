"""report.html: whole, safe, self-contained, and made again from its files alone."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from acckv import InputError
from acckv.evaluation.results import (
    Answer,
    GroupScore,
    Results,
    Row,
    Setting,
    read_failures,
    read_predictions,
    write_predictions,
    write_results,
)
from acckv.evaluation.timeline import KeptEntries, Timeline, envelope, load_timelines, save_timelines
from acckv.report.answers import Answers
from acckv.report.html import MOST_FLIPS, REPORT_FILE, main, shown_policy, write_html
from acckv.report.run_record import Budget, RunRecord, read_run, write_run
from acckv.report.timeline import frames_left, modality_timelines
from lightning_modules.evaluation.versions import versions

HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(2)> & {{ 7 * 7 }}"
VOID = {"meta", "img", "source", "br", "link", "input", "hr"}
LAYERS, VIDEO, AUDIO, QUESTIONS = 3, 36, 20, 80


def _kept(policy: str, ratio: float, heads: int = 1) -> KeptEntries:
    generator = torch.Generator().manual_seed(int(1000 * ratio))
    video, audio = (
        (torch.rand(LAYERS, count, generator=generator) < ratio).to(torch.uint8) * heads for count in (VIDEO, AUDIO)
    )
    return KeptEntries(policy, ratio, HOSTILE, 0.0, video, audio, heads)


def _row(policy: str, ratio: float, accuracy: float, kept: float) -> Row:
    groups = {HOSTILE: GroupScore(QUESTIONS, accuracy), "Audio": GroupScore(0, None)}
    interval = (max(0.0, accuracy - 0.05), min(1.0, accuracy + 0.05))
    return Row(policy, ratio, QUESTIONS, accuracy, accuracy, interval, kept, 56.0, 1000 + round(kept), groups)


def _settings() -> dict[tuple[str, float], tuple[float, float]]:
    """(policy, ratio) -> accuracy, kept entries."""
    return {
        ("full", 1.0): (1.0, 56.0),
        ("control", 0.0): (0.25, 0.0),
        ("control_audio_evicted", 0.0): (0.5, 36.0),
        ("control_video_evicted", 0.0): (0.5, 20.0),
        ("keydiff", 0.1): (0.5, 5.3),
        ("acckv-calibrated", 0.2): (0.75, 11.0),
        ("acckv-calibrated", 0.1): (0.5, 5.3),
    }


def _write_evaluation(tmp_path: Path) -> None:
    """Files of an evaluation in which every text is hostile."""
    rows = [_row(policy, ratio, *values) for (policy, ratio), values in _settings().items()]
    write_results(tmp_path / "results.json", Results(HOSTILE, HOSTILE, "context", 3, rows))
    answers = []
    for (policy, ratio), (accuracy, _) in _settings().items():
        for item in range(QUESTIONS):
            score = float(item % 4 < 4 * accuracy)
            texts = (f"{item} {HOSTILE}", HOSTILE, HOSTILE if score else "")
            judged: dict[str, Any] = {"cut": False, "score": score, "official": score, "robust": None, "parsed": True}
            answers.append(Answer(policy, ratio, str(item), item // 8, HOSTILE, "word", ["Audio"], *texts, **judged))
    write_predictions(tmp_path / "predictions.jsonl", answers)
    shares = [(9.0, 1.0), (3.0, 2.0), (0.0, 0.0)]
    budgets = [Budget("acckv-calibrated", 0.1, shares), Budget("keydiff", 0.1, [(4.0, 1.0)] * 3)]
    write_run(tmp_path / "report.json", RunRecord(f"python evaluate.py {HOSTILE}", versions(), (36.0, 20.0), budgets))
    (tmp_path / "failures.json").write_text(json.dumps([{"clip": HOSTILE, "error": HOSTILE}]))
    kept = [_kept("acckv-calibrated", 0.1), _kept("keydiff", 0.2, heads=2)]
    pictures = torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).view(4, 3, 8, 8)
    wave = envelope(torch.sin(torch.arange(16_000) / 5))
    timeline = Timeline(HOSTILE, HOSTILE, HOSTILE, "", 8.0, 4, (3, 3), pictures, wave, kept)
    save_timelines(tmp_path / "timelines.safetensors", [timeline])


class _Page(HTMLParser):
    """Collects elements and text, and fails on a tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _page(folder: Path) -> tuple[str, _Page]:
    text = write_html(folder).read_text(encoding="utf-8")
    return text, _Page(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, _Page]:
    """Such files with their report."""
    folder = tmp_path_factory.mktemp("eval")
    _write_evaluation(folder)
    return folder, *_page(folder)


@pytest.fixture
def folder(written: tuple[Path, str, _Page], tmp_path: Path) -> Path:
    """A copy of them, to be changed."""
    return Path(shutil.copytree(written[0], tmp_path / "eval"))


def test_hostile_text_stays_text(written: tuple[Path, str, _Page]) -> None:
    _, text, page = written
    assert page.all("script") == []
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert "<script" not in text
    # Title, command, failure, group, question, answers, timeline: what was written is what is read.
    assert page.text.count(HOSTILE) > 50
    assert "49" not in re.findall(r"{{.*?}}", page.text)


def test_nothing_is_loaded_from_elsewhere(written: tuple[Path, str, _Page]) -> None:
    _, text, page = written
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    names = ("src", "href", "srcset")
    links = [attributes[name] or "" for _, attributes in page.elements for name in names if name in attributes]
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text


def test_every_image_decodes_and_has_words(written: tuple[Path, str, _Page]) -> None:
    _, _, page = written
    images = page.all("img")
    sources = [image["src"] or "" for image in images]
    # Frames; of each compression what is left and two maps.
    assert len(sources) == 1 + 2 * 3
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1], validate=True))) as image:
            image.load()
            assert min(image.size) > 0
    assert all(image["alt"] for image in images)
    drawings = page.all("svg")
    assert len(drawings) == 2 + 1 + 2 * 2  # curves, sound, bars
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)


def test_sections_and_tables_can_be_found_by_a_screen_reader(written: tuple[Path, str, _Page]) -> None:
    _, text, page = written
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {(link["href"] or "")[1:] for link in page.all("a")} <= set(names)
    assert page.all("html") == [{"lang": "en"}]
    assert all("scope" in cell for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) == text.count("<thead>") > 5
    assert len(page.all("h1")) == len(page.all("main")) == 1


def test_flips_are_counted_both_ways_and_the_list_is_cut(folder: Path) -> None:
    answers = Answers(read_predictions(folder / "predictions.jsonl"))
    flips = answers.flips(Setting("acckv-calibrated", 0.1))
    assert (len(flips.lost), len(flips.won)) == (40, 0)
    changed = [
        replace(answer, score=0.0) if answer.policy == "full" and answer.id in ("2", "3") else answer
        for answer in read_predictions(folder / "predictions.jsonl")
    ]
    write_predictions(folder / "predictions.jsonl", changed)
    flips = Answers(changed).flips(Setting("acckv-calibrated", 0.2))
    assert [flip.full.id for flip in flips.won] == ["2"]
    assert len(flips.lost) == 19
    _, page = _page(folder)
    assert f"acckv-calibrated at 0.1: 38 lost, the first {MOST_FLIPS} shown" in page.text
    assert "acckv-calibrated at 0.2: 1 won" in page.text


def test_share_of_full_is_paired_by_clip(folder: Path) -> None:
    answers = Answers(read_predictions(folder / "predictions.jsonl"))
    # Every clip has eight questions of which the same share is right: no draw of clips differs from another.
    assert answers.share_of_full(Setting("keydiff", 0.1), seed=0) == pytest.approx((0.5, 0.5))
    assert answers.share_of_full(Setting("nothing", 0.1), seed=0) is None


def test_timelines_survive_the_round_trip(folder: Path, tmp_path: Path) -> None:
    (timeline,) = load_timelines(folder / "timelines.safetensors")
    save_timelines(tmp_path / "again.safetensors", [timeline])
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "timelines.safetensors").read_bytes()
    assert (timeline.question, timeline.grid, timeline.seconds) == (HOSTILE, (3, 3), 8.0)
    assert timeline.kept[1].heads == 2
    assert torch.equal(timeline.kept[1].video, _kept("keydiff", 0.2, heads=2).video)


def test_shares_over_time_are_those_of_the_entries() -> None:
    video = torch.zeros(2, 8, dtype=torch.uint8)
    video[0, 6:] = 2
    video[1, 7] = 1
    kept = KeptEntries("snapkv", 0.2, "", 0.0, video, torch.zeros(2, 0, dtype=torch.uint8), heads=2)
    assert kept.shares("video", 4).tolist() == [[0, 0, 0, 1], [0, 0, 0, 0.25]]
    pictures = torch.full((4, 3, 6, 4), 90, dtype=torch.uint8)
    clip = Timeline("a.mp4", "", "", "", 4.0, 4, (2, 1), pictures, envelope(None), [kept])
    (part,) = modality_timelines(clip, kept)
    assert (part.modality, part.entries, part.peak_seconds) == ("video", 8, (3.0, 4.0))
    assert part.kept == pytest.approx(5 / 32)
    assert part.peak == pytest.approx((1 + 0.25) / 2)
    left = frames_left(clip, kept)
    assert left is not None
    with Image.open(io.BytesIO(base64.b64decode(left.split(",")[1]))) as image:
        opacity = torch.tensor(list(image.convert("RGBA").getchannel("A").tobytes())).view(6, 4, 6)[:, :, 2]
    # Of the last picture the upper half was kept by half of all heads of the layers, the lower by three quarters.
    assert opacity[:, :3].max() == 0
    assert opacity[1, 3] == pytest.approx(255 * 0.5 / 0.75, abs=2)
    assert opacity[4, 3] == 255


def test_made_again_from_the_files_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / REPORT_FILE).read_text(encoding="utf-8")
    (folder / REPORT_FILE).unlink()
    assert main([str(folder)]) == 0
    assert (folder / REPORT_FILE).read_text(encoding="utf-8") == text
    for name in ("report.json", "timelines.safetensors", "failures.json"):
        (folder / name).unlink()
    assert main([str(folder)]) == 0
    assert "Not recorded" in (folder / REPORT_FILE).read_text(encoding="utf-8")
    capsys.readouterr()
    (folder / "results.json").unlink()
    assert main([str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {folder / 'results.json'}: no such file\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("predictions.jsonl", "{", "line 1: not valid JSON"),
        ("predictions.jsonl", '{"policy": "full"}', "line 1.ratio: missing"),
        ("report.json", '{"format": 9}', "format: unknown format 9; this version reads format 1"),
        ("report.json", '{"format": 1, "command": null}', "versions: missing"),
        ("timelines.safetensors", "xx", "not a whole file of timelines"),
        ("failures.json", "[1]", "[0]: expected an object"),
    ],
)
def test_a_broken_file_is_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{folder / name}: {message}")):
        write_html(folder)


def test_run_record_survives_the_round_trip(folder: Path) -> None:
    run = read_run(folder / "report.json")
    write_run(folder / "again.json", run)
    assert (folder / "again.json").read_bytes() == (folder / "report.json").read_bytes()
    assert {"python", "torch", "transformers", "acckv"} <= set(run.versions)
    assert run.versions["torch"] == torch.__version__.split("+")[0] or run.versions["torch"] == torch.__version__
    assert read_failures(folder / "none.json") == []


def test_the_shown_policy_looks_at_the_entries() -> None:
    measured = (("full", 1.0, 1.0, 56.0), ("random", 0.1, 0.9, 5.0), ("h2o", 0.1, 0.3, 5.0), ("knorm", 0.1, 0.4, 5.0))
    rows = [_row(*values) for values in measured]
    assert shown_policy(Results("m", "b", "context", 0, rows)) == "knorm"
    assert shown_policy(Results("m", "b", "context", 0, rows[:2])) == "random"
    assert shown_policy(Results("m", "b", "context", 0, rows[:1])) is None


def test_an_evaluation_of_the_full_cache_alone(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", Results("tiny", "clips", "prompt", 0, [_row("full", 1.0, 0.0, 56)]))
    write_predictions(tmp_path / "predictions.jsonl", [])
    _, page = _page(tmp_path)
    assert "No policy was measured" in page.text


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
PROBE = """<script>addEventListener("load", () => {
  const broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
  const wide = document.documentElement.scrollWidth - innerWidth;
  document.title = `broken ${broken} of ${document.images.length}, too wide by ${Math.max(0, wide)}`;
})</script>"""


def test_a_browser_shows_all_of_it_on_a_phone(written: tuple[Path, str, _Page], folder: Path) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    _, text, page = written
    # The page allows no script, so a copy that does is measured.
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', PROBE, text)
    (folder / "probe.html").write_text(open_page.replace("<details>", "<details open>"), encoding="utf-8")
    picture = folder / "screen.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=500,1000"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", "--dump-dom"]
    done = subprocess.run(
        [browser, *options, (folder / "probe.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert title[1] == f"broken 0 of {len(page.all('img'))}, too wide by 0"
    with Image.open(picture) as image:
        assert image.size == (500, 1000)
        assert len(image.convert("L").getcolors() or []) > 20
