"""Bad input on the command line: one line on stderr that names file and field, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import logging
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from acckv.data.synthetic.clips import write_clips
from acckv.errors import InputError
from acckv.models import load_model
from lightning_modules.cli.errors import BAD_INPUT, one_line, parser_error, run_cli
from tests.learned import calibrated
from tests.paths import ROOT

#: Arguments -> exit code and the lines on stderr.
Script = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with avqa-test.json and videos/ of two clips."""
    root = tmp_path_factory.mktemp("clips")
    return write_clips(root, "test", 2, questions_per_clip=2, workers=1, progress=False).parent


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = load_model("tiny")
    folder = tmp_path_factory.mktemp("calib") / "export"
    calibrated(model).save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Script:
    """Run a script; gives its exit code and the lines on stderr, and checks that nothing was left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCKV_CACHE", str(tmp_path / "cache"))
    logger = logging.getLogger("lightning.fabric")
    monkeypatch.setattr(logger, "level", logging.ERROR)  # its handler may hold the stderr of an earlier test

    def run(script: str, *arguments: object) -> tuple[int, list[str]]:
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == before, "something was left behind"
        return int(exit_.value.code or 0), capfd.readouterr().err.splitlines()

    return run


def _own_data(clips: Path, *more: object) -> list[object]:
    return [
        *("--data.question_file", clips / "avqa-test.json", "--data.video_root", clips / "videos"),
        *("--policies", "snapkv", "--ratios", "0.5", "--accelerator", "cpu", "--output", "out", *more),
    ]


def _only_line(result: tuple[int, list[str]]) -> str:
    code, lines = result
    assert code == BAD_INPUT
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


# ------------------------------------------------------------------ the command lines


@pytest.mark.parametrize(
    ("door", "config", "message"),
    [
        ("evaluate.py", "{ratios: [0.5], polices: [snapkv]}", r"polices: unknown option; did you mean policies\?$"),
        ("evaluate.py", "{data: {clip: 3}}", r"data\.clip: unknown option"),
        ("evaluate.py", "{ratios: [0.5, 1.5]}", r"ratios: 1\.5 is not a number from 0 to 1$"),
        ("evaluate.py", "ratios: [0.5,\n", "not a YAML mapping of options"),
        ("train.py", "{model: {ratio_minimum: 0.1}}", r"model\.ratio_minimum: unknown option"),
        ("train.py", "{seed_everything: 0, model: {ratio_max: 1.5}}", r"model\.ratio_.*1\.5"),
    ],
)
def test_configs(script: Script, tmp_path: Path, door: str, config: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(config)
    assert re.match(f"{re.escape(str(file))}: {message}", _only_line(script(door, "--config", file)))


def test_missing_video(script: Script, clips: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(clips / "videos", tmp_path / "videos")
    victim = sorted(videos.iterdir())[1]
    victim.unlink()
    file = clips / "avqa-test.json"
    line = _only_line(script("evaluate.py", *_own_data(clips, "--data.video_root", videos)))
    assert line.startswith(f"{file}: record ")
    assert "video_id" in line
    assert line.endswith(str(victim))


def test_text_file_named_mp4(script: Script, clips: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(clips / "videos", tmp_path / "videos")
    victim = sorted(videos.iterdir())[1]
    victim.write_text("this is not a film")
    line = _only_line(script("evaluate.py", *_own_data(clips, "--data.video_root", videos, "--strict", "true")))
    assert line.startswith(f"{victim}: not a readable media file")


def test_question_file_cut_in_the_middle(script: Script, clips: Path, tmp_path: Path) -> None:
    whole = (clips / "avqa-test.json").read_text()
    file = tmp_path / "cut.json"
    file.write_text(whole[: len(whole) // 2])
    line = _only_line(script("evaluate.py", *_own_data(clips, "--data.question_file", file)))
    assert line.startswith(f"{file}: not valid JSON (") and ": line " in line and line.endswith("cut off?")


def test_record_without_its_answer(script: Script, clips: Path, tmp_path: Path) -> None:
    rows = json.loads((clips / "avqa-test.json").read_text())
    del rows[2]["anser"]
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(rows))
    line = _only_line(script("evaluate.py", *_own_data(clips, "--data.question_file", file)))
    assert line == f"{file}: record 2, anser: missing"


@pytest.mark.parametrize("cut", [False, True])
def test_export_without_its_safetensors(script: Script, clips: Path, export: Path, tmp_path: Path, cut: bool) -> None:
    folder = shutil.copytree(export, tmp_path / "export")
    weights = folder / "model.safetensors"
    if cut:
        weights.write_bytes(weights.read_bytes()[:200])
    else:
        weights.unlink()
    card = (folder / "README.md").read_bytes()
    line = _only_line(
        script("evaluate.py", *_own_data(clips, "--policies", "acckv-calibrated", "--compressor", folder))
    )
    assert line.startswith(f"{weights}: ")
    assert ("truncated" if cut else "missing") in line
    assert (folder / "README.md").read_bytes() == card


def test_no_export_at_all_says_what_to_do(script: Script, clips: Path) -> None:
    line = _only_line(script("evaluate.py", *_own_data(clips, "--policies", "acckv-calibrated")))
    assert line.startswith("runs/calib/export: compressor: no such folder; calibrate first")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "snapkv,foo"], "policies: 'foo' is not one of full, "),
        (["--ratios", "1.5"], "ratios: 1.5 is not a number from 0 to 1"),
        (["--limit", "0"], "limit: 0 is less than 1"),
        (["--limit", "x"], "limit: "),
        (["--when", "later"], "when: "),
        (["--nonsense", "3"], "unrecognized arguments: --nonsense 3"),
        (["--model", "nowhere/at-all/there"], "nowhere/at-all/there: cannot be loaded"),
    ],
)
def test_bad_options(script: Script, clips: Path, arguments: list[str], message: str) -> None:
    assert _only_line(script("evaluate.py", *_own_data(clips, *arguments))).startswith(message)


def test_videos_without_questions(script: Script) -> None:
    line = _only_line(script("evaluate.py", "--policies", "full", "--data.video_root", "x"))
    assert line.startswith("data.video_root: is of use only")


def test_no_config(script: Script) -> None:
    assert "nothere.yaml" in _only_line(script("evaluate.py", "--config", "nothere.yaml"))


def test_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), "--ratios", "1.5"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == BAD_INPUT
    assert done.stderr == "error: ratios: 1.5 is not a number from 0 to 1\n"
    assert list(tmp_path.iterdir()) == []


def test_console_scripts_are_those_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, script in (("acckv-train", "train.py"), ("acckv-evaluate", "evaluate.py")):
        module, _, function = scripts[name].partition(":")
        assert f"from {module} import {function}\n" in (ROOT / script).read_text()
        monkeypatch.setattr(sys, "argv", [name, "--nonsense=3"])
        assert pkgutil.resolve_name(scripts[name])() == BAD_INPUT
        assert "nonsense" in capfd.readouterr().err


# ------------------------------------------------------------------ the helper


def test_an_error_that_is_not_the_users_keeps_its_traceback() -> None:
    def broken() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_cli(broken)
    assert run_cli(lambda: None) == 0


def test_an_error_from_a_loader_process_is_reduced_to_its_message() -> None:
    wrapped = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nacckv.errors.InputError: clip.mp4: no such file\n'
    )
    assert one_line(wrapped) == "clip.mp4: no such file"
    assert len(one_line("word " * 1000)) <= 400


def test_messages_of_the_parser_become_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("trainer:\n  max_steps: foo\n")
    argv = [f"--config={file}"]
    message = "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: foo"
    assert str(parser_error(message, argv)) == f"{file}: trainer.max_steps: expected int. Got value: foo"
    # A subcommand's key may stand deeper than in the file, and a key of the command line is in no file.
    deeper = parser_error('Parser key "fit.trainer.max_steps": bad', argv)
    assert deeper.source == str(file)
    assert parser_error('Parser key "trainer.devices": bad', argv).source is None
    union = (
        "Parser key \"a\":\n  Does not validate\n  Errors:\n    - Expected a <class 'bool'>\n    - no such class X\n"
    )
    assert str(parser_error(union, [])) == "a: no such class X"
    assert isinstance(parser_error("anything else\nat all", []), InputError)
    assert str(parser_error("anything else\nat all", [])) == "anything else at all"
