"""The plug-in inside lmms-eval itself: its own evaluator, its own tasks, the embedded model."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

pytest.importorskip("lmms_eval", reason='lmms-eval is not installed: pip install -e ".[lmms]"')

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelRegistryV2
from lmms_eval.tasks import TaskManager

from acckv.data.media import read_media
from acckv.errors import InputError
from acckv.models import load_model
from acckv.plugins.lmms_eval import Acckv, AcckvSimple
from acckv.plugins.lmms_manifest import manifest
from benchmarks.lmms_eval.prepare import FOLDER, prepare
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from tests.evaluation.runs import predictions, run
from tests.learned import calibrated
from tests.paths import ROOT

CLIPS, RATIO = 2, 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where lmms-eval is started: the questions lie where the tasks look for them, and an export beside them."""
    folder = tmp_path_factory.mktemp("work")
    prepare(folder / FOLDER, CLIPS, workers=1)
    calibrated(load_model("tiny")[0], noise=0.3).save_pretrained(folder / "export")
    return folder


@pytest.fixture(scope="module")
def own(folder: Path) -> dict[str, tuple[float, list[str]]]:
    """Accuracy and predictions of `evaluate.py` on the same questions, by policy."""
    videos = next((folder / FOLDER).glob("test-*"))
    options = EvaluationOptions(
        compressor=str(folder / "export"),
        policies="keydiff,acckv-calibrated",
        ratios=[RATIO],
        output=str(folder / "own"),
        data=EvaluationData(question_file=str(videos / "avqa-test.json"), video_root=str(videos / "videos")),
        update_card=False,
        accelerator="cpu",
    )
    results, _ = run(options)
    lines = predictions(folder / "own")
    found = {}
    for row in results.rows:
        given = [line["prediction"] for line in lines if (line["policy"], line["ratio"]) == (row.policy, row.ratio)]
        found[row.policy] = (row.accuracy, given)
    return found


def evaluate(task: str, model_args: str, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of a task, and its samples in their order."""
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    tasks = TaskManager(include_path=str(ROOT / "benchmarks" / "lmms_eval"), model_name="acckv")
    results = simple_evaluate(
        model="acckv", model_args=model_args, tasks=[task], task_manager=tasks, batch_size="3", **options
    )
    return results["results"][task], sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def test_the_entry_point_names_both_classes() -> None:
    line = 'acckv = "acckv.plugins.lmms_manifest:manifest"'
    assert f'[project.entry-points."lmms_eval.models"]\n{line}\n' in (ROOT / "pyproject.toml").read_text()
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("acckv") is Acckv
    assert registry.get_model_class("acckv", force_simple=True) is AcckvSimple


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [
        ("full", ""),
        ("keydiff", f",policy=keydiff,ratio={RATIO}"),
        ("acckv-calibrated", f",compressor=export,ratio={RATIO}"),
    ],
)
def test_a_task_scores_as_evaluate_does(
    folder: Path, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch, policy: str, arguments: str
) -> None:
    monkeypatch.chdir(folder)
    metrics, samples = evaluate("acckv_clips", f"pretrained=tiny{arguments}")
    accuracy, predictions = own[policy]
    assert len(samples) == 8 * CLIPS
    assert [sample["filtered_resps"][0] for sample in samples] == predictions
    assert metrics["accuracy,none"] == pytest.approx(accuracy)


def test_the_evaluations_differ(own: dict[str, Any]) -> None:
    """Otherwise equal scores would mean nothing."""
    assert own["full"][0] == 1.0
    assert len({tuple(predictions) for _, predictions in own.values()}) == len(own)


def test_choices_are_made_by_likelihood(folder: Path, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy one-word answer that is one of the choices is the most likely of them."""
    monkeypatch.chdir(folder)
    metrics, samples = evaluate(
        "acckv_clips_choice", f"pretrained=tiny,policy=keydiff,ratio={RATIO}", force_simple=True
    )
    chosen = []
    for sample, prediction in zip(samples, own["keydiff"][1], strict=True):
        losses = [loss for loss, _ in sample["filtered_resps"]]
        choices = sample["doc"]["choices"]
        chosen.append(choices[losses.index(min(losses))])
        if prediction in choices:
            assert chosen[-1] == prediction
    right = [choice == sample["doc"]["answer"] for choice, sample in zip(chosen, samples, strict=True)]
    assert metrics["acc,none"] == pytest.approx(sum(right) / len(right))


# ------------------------------------------------------------------ the model by itself


@pytest.fixture(scope="module")
def documents(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / FOLDER / "questions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def request(*arguments: Any) -> Instance:
    """A request of the task `clips` about document 0."""
    metadata = {"task": "clips", "doc_id": 0, "repeats": 1}
    return Instance("generate_until", ("", *arguments, 0, "clips", "test"), 0, metadata)


def rounds(document: dict[str, Any], texts: list[str], **round: Any) -> Any:
    """What a task with several rounds gives: the clip with the next question, or the end."""
    number = round.get("round_idx", 0)
    if number == len(texts):
        return None, True, round["previous_output"], None
    content = [{"type": "video", "url": document["video"]}, {"type": "text", "text": texts[number]}]
    messages = [{"role": "user", "content": content}]
    return (messages, False, round["previous_output"], None) if round else messages


def test_rounds(documents: list[dict[str, Any]]) -> None:
    model = Acckv(batch_size=2)
    model.task_dict = {"clips": {"test": documents}}
    questions = [document["question"] for document in documents[:3]]
    asked = request(functools.partial(rounds, texts=questions), {"max_new_tokens": 4})
    assert model.generate_until_multi_round([asked]) == [[document["answer"] for document in documents[:3]]]
    endless = request(lambda document, **round: rounds(document, questions), {})
    with pytest.raises(InputError, match="clips: doc_to_messages: must return"):
        model.generate_until_multi_round([endless])
    with pytest.raises(NotImplementedError, match="--force_simple"):
        model.loglikelihood([])


def test_answers_keep_their_order(documents: list[dict[str, Any]]) -> None:
    """Requests about other clips and with other options stand in between."""
    model = Acckv(batch_size="4")
    model.task_dict = {"clips": {"test": documents}}
    order = [0, 9, 1, 2, 10, 11, 3]

    def ask(number: int, limit: int) -> Instance:
        metadata = {"task": "clips", "doc_id": number, "repeats": 1}
        to_messages = functools.partial(rounds, texts=[documents[number]["question"]])
        arguments = ("", to_messages, {"max_new_tokens": limit, "until": ["\n\n"]}, number, "clips", "test")
        return Instance("generate_until", arguments, 0, metadata)

    answers = model.generate_until([ask(number, 4 + number % 2) for number in order])
    assert answers == [documents[number]["answer"] for number in order]


def test_pictures_and_sounds_that_a_data_set_decoded(documents: list[dict[str, Any]]) -> None:
    """As OmniBench gives them: the same answer by both kinds of model, and as from the files."""
    media = ROOT / "tests/fixtures/benchmarks/omnibench/mm_data"
    picture, sound = media / "image/1_24.png", media / "audio/1_24.mp3"
    heard = read_media(sound)
    assert heard.audio is not None
    in_memory = [{"array": heard.audio.numpy(), "sampling_rate": heard.sampling_rate}, PIL.Image.open(picture)]
    question = documents[0]["question"]

    def ask(model: Acckv, *arguments: Any) -> list[str]:
        model.task_dict = {"clips": {"test": documents}}
        return model.generate_until(
            [
                Instance(
                    "generate_until", (*arguments, 0, "clips", "test"), 0, {"task": "clips", "doc_id": 0, "repeats": 1}
                )
            ]
        )

    def messages(parts: list[Any]) -> Any:
        kinds = zip(("audio", "image"), parts, strict=True)
        content = [*({"type": kind, "url": part} for kind, part in kinds), {"type": "text", "text": question}]
        return lambda document: [{"role": "user", "content": content}]

    limit = {"max_new_tokens": 4}
    options: dict[str, Any] = {"policy": "keydiff", "ratio": 0.2}
    from_files = ask(Acckv(**options), "", messages([str(sound), str(picture)]), limit)
    assert ask(Acckv(**options), "", messages(in_memory), limit) == from_files
    assert ask(AcckvSimple(**options), question, limit, lambda document: in_memory) == from_files


def test_rank_and_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Acckv().rank, Acckv().world_size) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (Acckv().rank, Acckv().world_size) == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size: 'auto'"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"use_flash": True}, "--model_args: use_flash: is no argument"),
        ({"ratio": 0.1}, "ratio: needs a compressor"),
        ({"pretrained": "no/such/model/folder"}, "no/such/model/folder: cannot be loaded"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Acckv(**options)
