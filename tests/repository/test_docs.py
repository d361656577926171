"""Every Python block of the README and of docs/ runs, every command takes its options, and what is named exists."""

from __future__ import annotations

import json
import pkgutil
import re
import runpy
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from acckv.benchmarks import BENCHMARKS
from acckv.data.encoding import encode
from acckv.data.media import read_media
from acckv.method.weights import WEIGHT_GROUPS, CalibratedWeights
from acckv.models import FAMILIES as MODEL_FAMILIES
from acckv.models import load_model
from acckv.policies import POLICIES
from benchmarks.headline import NAMED, RESULTS, curves
from tests.data.media_files import write_video
from tests.families import FAMILIES
from tests.learned import calibrated
from tests.paths import ROOT, module_at
from tests.repository.pages import PAGES, blocks, commands, prose, spans

README = ROOT / "README.md"
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader has at hand: a clip and an export in the current folder, a model, and a decoder of their own."""
    monkeypatch.chdir(tmp_path)
    sound = np.sin(np.arange(6 * 16_000) / 20).astype(np.float32)[None]
    write_video(Path("clip.mp4"), [0.0, 1.0, 2.5, 4.0, 5.9], [40, 90, 140, 190, 40], sound, size=(84, 84))
    model, processor = load_model("tiny")
    compressor = calibrated(model)
    compressor.save_pretrained("runs/calib/export")
    decoder = FAMILIES["videollama2"].build()
    return {
        "__name__": "page",
        "compressor": compressor.with_ratio(0.1),
        "model": model,
        "processor": processor,
        "clip": read_media("clip.mp4"),
        "inputs": encode(processor, [read_media("clip.mp4")], ["what colour ?"]),
        "decoder": decoder,
        "embed": decoder.get_input_embeddings(),
        "prompt_ids": torch.tensor([[2, 10]]),
        "question_ids": torch.tensor([[20, 21]]),
        "video_features": torch.randn(1, 30, 64),
        "audio_features": torch.randn(1, 10, 64),
    }


def test_python_blocks_run(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    ran = {}
    for page in PAGES:
        seen = dict(names)
        for block in blocks(page, "python"):
            code = compile("\n" * block.line + block.code, str(block.page), "exec")
            if block.runs:
                exec(code, seen)
        ran[page.name] = seen
    assert ran["README.md"]["output"].shape[1] > ran["README.md"]["inputs"]["input_ids"].shape[1]
    assert ran["own-model.md"]["output"].shape == (1, 64)
    held = [layer.physical for layer in ran["usage.md"]["cache"].layers]
    assert held == [64] * len(held)  # the stream's budget
    assert len(capsys.readouterr().out.splitlines()) == 2  # two answers about one clip
    assert isinstance(ran["sessions.md"]["text"], str) and not ran["sessions.md"]["thread"].is_alive()


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From its first cell to its last, to the answers that stand in it where nothing is evicted."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    right = [line.partition("(right: ")[2].rstrip(")") for line in printed if "(right: " in line]
    assert right and [line.split(",")[0].strip() for line in printed if "0.5: " in line] == [f"1: {a}" for a in right]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    shown = [line for output in outputs for line in output.get("text", ())]
    assert len(shown) == len(printed) and sum("image/png" in output.get("data", ()) for output in outputs) == 2
    assert all(output.get("name") != "stderr" for output in outputs)  # holds a machine's paths


# ------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def options_of() -> Callable[..., set[str]]:
    """The options that a script or module prints with ``--help``, asked once."""
    known: dict[tuple[str, ...], set[str]] = {}

    def options(*words: str) -> set[str]:
        if words not in known:
            known[words] = set(re.findall(r"--[\w.-]*\w", _run(*words, "--help")[1]))
        return known[words]

    return options


def _run(target: str, *words: str) -> tuple[int, str]:
    """Exit code and output of a script or module, in this process."""
    patch, out, code = pytest.MonkeyPatch(), StringIO(), 0
    patch.chdir(ROOT)
    patch.setattr(sys, "argv", [target, *words])
    patch.setenv("COLUMNS", "200")
    try:
        with redirect_stdout(out), redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a module that was imported before
            if target.endswith(".py"):
                runpy.run_path(target, run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        patch.undo()
    return code, out.getvalue()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return module_at("docs/generate.py")


SUBCOMMANDS = {"train.py": ("fit", "validate", "export"), "evaluate.py": ("ask", "merge")}
SCRIPTS = {"acckv-train": "train.py", "acckv-evaluate": "evaluate.py"}
#: Checked by other means, or no program of ours.
FOREIGN = {"pip", "pytest", "mkdocs", "make", "jupyter", "lmms-eval", ".ci/run"}


def _check(words: list[str], options_of: Callable[..., set[str]]) -> None:
    """A command's program exists, and takes the options that are given."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program in SCRIPTS:
        program, rest = "python", [SCRIPTS[program], *rest]
    if program == "pip":
        for extra in re.findall(r"\[(\w+)\]", " ".join(rest)):
            assert extra in EXTRAS, extra
    if program == "make":
        assert {*rest} <= {*re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)}
    if program == "python":
        target, *rest = rest[1:] if rest[0] == "-m" else rest
        if target == "pytest" or target.startswith("tests."):
            return
        default = SUBCOMMANDS.get(target, ())[:1] if target == "train.py" else ()
        sub = (rest[0],) if rest and rest[0] in SUBCOMMANDS.get(target, ()) else default
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("--"):
                assert name in options_of(target, *sub), f"{target} {' '.join(sub)} has no {name}"
        if target in SUBCOMMANDS and sub in ((), ("fit",)):  # values, too
            code, printed = _run(target, *rest, "--print_config")
            assert code == 0, printed
    else:
        assert program in FOREIGN, f"unknown command {program}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_take_their_options(page: Path, options_of: Callable[..., set[str]]) -> None:
    for block in blocks(page, "bash"):
        for words in commands(block):
            _check(words, options_of)


# ------------------------------------------------------------------ names


@pytest.fixture(scope="module")
def every_option(options_of: Callable[..., set[str]]) -> set[str]:
    """The options of every script and benchmark."""
    known = {"--nproc_per_node", "--model_args"}  # of torchrun and lmms-eval
    for script, subcommands in SUBCOMMANDS.items():
        known |= options_of(script).union(*(options_of(script, name) for name in subcommands))
    for file in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("benchmarks/*/__main__.py"), *ROOT.glob("acckv/tiny/*.py")]:
        text = file.read_text(encoding="utf-8")
        if "argparse" in text and (file.stem == "__main__" or '__name__ == "__main__"' in text):
            known |= options_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    return known


#: Packages and folders of the repository that pages name.
HERE = "acckv|lightning_modules|benchmarks|tests|configs|docs|examples"
#: Files of a run or an export.
OF_A_RUN = {"config.yaml", "model.safetensors"}
#: A method that looks like an option of the group `model`.
METHOD = "model.generate"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_named_exists(page: Path, every_option: set[str]) -> None:
    if page.name == "models-sweep.md":
        return
    for span in spans(page):
        for option in re.findall(r"(?<![\w-])--[\w.-]*\w", span):
            assert option in every_option, option
        for option in re.findall(r"(?<![\w./-])(?:model|data|trainer|checkpoint|evaluation)\.[\w.]*\w", span):
            assert f"--{option}" in every_option or option in {METHOD, *OF_A_RUN}, option
        for name in re.findall(rf"(?<![\w/.-])(?:{HERE})(?:\.\w+)+", span):
            assert pkgutil.resolve_name(name) is not None
        for file in re.findall(rf"(?<![\w/.-])(?:{HERE})/[\w./-]*\w", span):
            assert (ROOT / file).exists(), file
        for config in re.findall(r"(?<![\w/])\w+\.yaml", span):
            assert config in OF_A_RUN or (ROOT / "configs" / config).is_file(), config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", prose(page)):
        if not target.startswith("http"):
            generated = page.parent.name == "docs" and target in ("index.md", "contributing.md", "changelog.md")
            assert generated or (page.parent / target).exists(), target


def test_the_reference_names_what_there_is() -> None:
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert pkgutil.resolve_name(name) is not None


def test_the_drawing_is_that_of_the_imports(generate: ModuleType) -> None:
    """``python docs/generate.py`` draws it anew."""
    graph = generate.rooms()
    assert generate.DRAWING.read_text(encoding="utf-8") == generate.drawing(graph)
    arrows = generate.reduced(graph)

    def reached(name: str, among: dict[str, set[str]]) -> set[str]:
        found: set[str] = set()
        new = {name}
        while new := set().union(*(among[one] for one in new)) - found:
            found |= new
        return found

    assert sum(map(len, arrows.values())) < sum(map(len, graph.values()))
    assert all(reached(name, arrows) == reached(name, graph) for name in graph)


def test_the_policies_page_is_that_of_the_registry(generate: ModuleType) -> None:
    """``python docs/generate.py`` writes it anew."""
    page = generate.PAGE.read_text(encoding="utf-8")
    assert page == generate.with_section(page, generate.policies())
    assert all(f"\n## {name}\n" in page for name in POLICIES if POLICIES[name].__module__.startswith("acckv."))


def test_the_tests_of_every_trap_exist() -> None:
    named = re.findall(r"`(test_\w+)::(test_\w+)`", (ROOT / "tests" / "README.md").read_text())
    code = {file.stem: file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in code.get(file, "")]
    assert len(named) > 20 and not missing


def test_code_cites_pages_that_exist() -> None:
    for file in [*ROOT.glob("acckv/**/*.py"), *ROOT.glob("lightning_modules/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        for page in re.findall(r"docs/[\w-]+\.md", file.read_text(encoding="utf-8")):
            assert (ROOT / page).is_file(), f"{file}: {page}"


def test_the_method_lists_every_learned_weight_with_its_shape() -> None:
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| `\[(.*?)\]` \| (\w+) \|", text, re.MULTILINE)
    sizes = {"L": 2, "K": 3, "Hq": 6, "D": 5, "2D": 10, "P": 4, "U": 7}
    shapes = {name: tuple(sizes.get(part) or int(part) for part in shape.split(", ")) for name, shape, _ in listed}
    weights = CalibratedWeights(layers=2, kv_heads=3, query_heads=6, head_size=5, probes=4, units=7)
    assert shapes == {name: tuple(weight.shape) for name, weight in weights.named_parameters()}
    assert {name: group for name, _, group in listed} == {
        name: group for group, names in WEIGHT_GROUPS.items() for name in names
    }


# ------------------------------------------------------------------ the README


def test_the_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2000


def test_policies_and_benchmarks_are_listed() -> None:
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## Policies") : text.index("## Calibrate")]
    named = re.findall(r"`([a-z0-9_]+)`", section.partition("(as published)")[0])
    assert named == [name for name, policy in POLICIES.items() if policy.__module__.startswith("acckv.")]
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    benchmarks = [name for name, one in BENCHMARKS.items() if one.load.__module__.startswith("acckv.")]
    assert sorted(re.findall(r"^\| `(\w+)` \| .*\|.*\|.*\|$", page, re.MULTILINE)) == sorted([*benchmarks])
    assert all(BENCHMARKS[name].title.split(" ")[0] in text for name in benchmarks if name != "custom")
    section = text[text.index("## Families") : text.index("## Policies")]
    families = [family for family in MODEL_FAMILIES.values() if family.model_adapter.__module__.startswith("acckv.")]
    assert all(name in section for family in families for name in family.title.split(", "))


def test_results_at_a_glance_are_rows_of_the_measured_table() -> None:
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## Results at a glance") : text.index("## Limits")]
    table = [line for line in section.splitlines() if line.startswith("|")]
    measured = (ROOT / "docs/results.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 8 and set(table) <= set(measured)
    lines, policies, full, control = curves(RESULTS / "study.json")
    rows = {row.split("|")[1].strip(" *"): row.split("|")[2:-1] for row in table[2:]}
    drawn: dict[str, list[float | None]] = {name: [None, *policies[name], None] for name in NAMED}
    drawn |= {"full cache": [full], "acckv-calibrated": []}
    assert len(policies) == 13 and {*rows} == {*drawn, "every entry evicted (control)"}
    for name, values in drawn.items():
        for cell, value in zip(rows[name], values, strict=False):
            assert cell.strip(" *") == ("" if value is None else f"{100 * value:.1f}")
    assert [cell.strip(" *") for cell in rows["acckv-calibrated"]][1:-1] == [
        f"{100 * line.accuracy:.1f}" for line in lines
    ]
    assert f"{100 * control:.1f}" == rows["every entry evicted (control)"][-1].strip()
