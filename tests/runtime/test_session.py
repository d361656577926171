"""Sessions under plain generate: nothing changes that should not, and everything else as the one-row reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from acckv import InputError, KVCompressor, policies
from acckv.cache.cache import compressed_layers
from acckv.config import HeadBudgets, When
from acckv.policies.base import Queries
from tests import tiny_omni
from tests.pairwise import by_turns
from tests.support import not_none
from tests.support.running import continued, fingerprint

POLICIES = [name for name in policies.POLICIES if name != "full"]
ATTENTION, WHEN, HEADS = ["sdpa", "eager"], ["context", "prompt"], ["equal", "joint"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=ATTENTION)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_omni.build(attention=request.param)


@pytest.fixture(scope="module")
def sdpa() -> Any:
    return tiny_omni.build()


@pytest.mark.parametrize(
    ("model", "policy", "when"), by_turns(ATTENTION, ["full", *POLICIES], WHEN), indirect=["model"]
)
def test_ratio_one_is_the_plain_model(model: Any, policy: str, when: When) -> None:
    plain = model.generate(**tiny_omni.prompt(), **GREEDY)
    before = fingerprint(model)
    with KVCompressor(policy, when=when, ratio=1.0)(model, tiny_omni.Tokenizer()):
        inside = model.generate(**tiny_omni.prompt(), **GREEDY)
    assert torch.equal(plain, inside)
    assert fingerprint(model) == before
    assert torch.equal(plain, model.generate(**tiny_omni.prompt(), **GREEDY))


@pytest.mark.parametrize(("when", "policy", "ratio"), by_turns(WHEN, POLICIES, [0.5, 0.13, 0.0]))
def test_budget_is_exact_and_nothing_stays(sdpa: Any, policy: str, when: When, ratio: float) -> None:
    before = fingerprint(sdpa)
    with KVCompressor(policy, when=when, ratio=ratio)(sdpa, tiny_omni.Tokenizer()) as session:
        sdpa.generate(**tiny_omni.prompt(), **GREEDY)
        cache = not_none(session.last_cache)
        kept, text = cache.kept_entries(), [layer.region for layer in compressed_layers(cache)]
    media = tiny_omni.VIDEO_TOKENS + tiny_omni.AUDIO_TOKENS
    assert kept.sum() == int(ratio * 3 * media + 1e-9)
    length = tiny_omni.context()["input_ids"].shape[1] + (3 if when == "prompt" else 0)
    assert text == [length - media + int(layer) for layer in kept.sum(-1).tolist()]
    assert fingerprint(sdpa) == before


def test_absolute_budget(sdpa: Any) -> None:
    """`budget` entries a layer on average, whatever `ratio` says; never more than there are."""
    for budget, kept in ((5, 5), (100, tiny_omni.VIDEO_TOKENS + tiny_omni.AUDIO_TOKENS)):
        with KVCompressor("keydiff", ratio=1.0, budget=budget)(sdpa) as session:
            assert session.compress(**tiny_omni.context()).kept_entries().sum(-1).tolist() == [kept] * 3


def test_an_error_inside_leaves_nothing(sdpa: Any) -> None:
    before = fingerprint(sdpa)
    with pytest.raises(KeyError), KVCompressor()(sdpa):
        raise KeyError
    assert fingerprint(sdpa) == before


@pytest.mark.parametrize(
    ("model", "heads", "policy"), by_turns(by_turns(ATTENTION, HEADS), POLICIES), indirect=["model"]
)
def test_generate_equals_compress_then_answer(model: Any, heads: HeadBudgets, policy: str) -> None:
    question = torch.tensor([[20, 21, 22]])
    with KVCompressor(policy, ratio=0.3, head_budgets=heads)(model, tiny_omni.Tokenizer()) as session:
        whole = model.generate(**tiny_omni.prompt(), **GREEDY)
        cache = session.compress(**tiny_omni.context())
        held = cache.kv_bytes()
        first = session.answer(cache, question, **GREEDY)
        again = session.answer(cache, question, **GREEDY)
        assert cache.kv_bytes() == held
    assert torch.equal(whole[:, -6:], first)
    assert torch.equal(first, again)


def test_prefill_serves_policies_and_ratios(sdpa: Any) -> None:
    """One shared prefill gives what each policy's own would."""
    for policy in POLICIES:
        for ratio in (0.4, 0.1):
            with KVCompressor(policy, ratio=ratio)(sdpa, tiny_omni.Tokenizer()) as session:
                shared = session.compress(session.prefill(**tiny_omni.context()))
                own = session.compress(**tiny_omni.context())
            for one, other in zip(compressed_layers(shared), compressed_layers(own), strict=True):
                assert torch.equal(one.keys, other.keys), policy


def left_padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    width = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {}
    for name, value in rows[0].items():
        if name in ("input_ids", "attention_mask"):
            padded = [torch.nn.functional.pad(row[name], (width - row[name].shape[1], 0)) for row in rows]
            batch[name] = torch.cat(padded)
        else:
            batch[name] = torch.cat([row[name] for row in rows]) if isinstance(value, Tensor) else value
    return batch


@pytest.mark.parametrize(
    ("model", "heads", "policy", "when"),
    by_turns(by_turns(ATTENTION, HEADS), [name for name in POLICIES if name != "random"], WHEN),
    indirect=["model"],
)
def test_left_padded_batch_equals_single_rows(model: Any, heads: HeadBudgets, policy: str, when: When) -> None:
    """Clips whose media start and end at different places, questions of different length."""
    rows = [
        tiny_omni.prompt((20, 21, 22), seed=0),
        tiny_omni.prompt((25,), seed=1, intro=(2, 10, 11, 12, 13, 14)),
        tiny_omni.prompt((26, 27, 28, 29, 30, 31, 32), seed=2, intro=(2,)),
    ]
    compressor = KVCompressor(policy, when=when, ratio=0.35, head_budgets=heads)
    with compressor(model, tiny_omni.Tokenizer()):
        single = [model.generate(**row, **GREEDY)[0, -6:].tolist() for row in rows]
        batch = model.generate(**left_padded(rows), **GREEDY)[:, -6:].tolist()
    assert batch == single


@pytest.mark.parametrize(("policy", "heads"), [("snapkv", "equal"), ("acckv", "equal"), ("keydiff", "joint")])
def test_beams_samples_and_several_returns(sdpa: Any, policy: str, heads: HeadBudgets) -> None:
    """Beam search reorders the cache: each beam's sequence must score as when it is replayed alone."""
    with KVCompressor(policy, ratio=0.3, head_budgets=heads)(sdpa, tiny_omni.Tokenizer()) as session:
        beams = sdpa.generate(
            **tiny_omni.prompt(),
            max_new_tokens=6,
            num_beams=3,
            num_return_sequences=3,
            return_dict_in_generate=True,
            output_scores=True,
        )
        torch.manual_seed(0)
        samples = sdpa.generate(**tiny_omni.prompt(), max_new_tokens=6, do_sample=True, num_return_sequences=4)
        assert len({tuple(row) for row in samples[:, -6:].tolist()}) > 1
        cache = session.compress(**tiny_omni.context())
        for row, score in zip(beams.sequences[:, -6:], beams.sequences_scores, strict=True):
            logits = continued(sdpa, session, cache, (20, 21, 22, *row.tolist()))
            chosen = logits[2:-1].log_softmax(-1).gather(-1, row[:, None]).sum()
            assert chosen / 6 == pytest.approx(float(score), abs=1e-4)


def test_several_questions_in_one_call(sdpa: Any) -> None:
    """Two clips with two left-padded questions each equal four single answers."""
    clips = [tiny_omni.context(), tiny_omni.context(1, intro=(2, 10, 11, 12))]
    questions = [[20, 21, 22], [23], [24, 25], [26, 27, 28]]
    ids = torch.tensor([[0] * (3 - len(question)) + question for question in questions])
    mask = torch.tensor([[0] * (3 - len(question)) + [1] * len(question) for question in questions])
    with KVCompressor("keydiff", ratio=0.3)(sdpa) as session:
        together = session.answer(session.compress(**left_padded(clips)), ids, mask, **GREEDY).tolist()
        alone = [
            session.answer(session.compress(**clips[index // 2]), torch.tensor([question]), **GREEDY)[0].tolist()
            for index, question in enumerate(questions)
        ]
    assert together == alone


def test_errors_name_the_remedy(sdpa: Any) -> None:
    with pytest.raises(InputError, match="pass the processor"), KVCompressor()(sdpa):
        sdpa.generate(**tiny_omni.prompt(), **GREEDY)
    session = KVCompressor("keydiff")(sdpa)
    with pytest.raises(InputError, match="is closed"):
        session.prefill(**tiny_omni.context())
    with pytest.raises(InputError, match="supported model types"):
        KVCompressor()(torch.nn.Linear(2, 2))
    with KVCompressor("keydiff")(sdpa), pytest.raises(InputError, match="dynamic cache"):
        sdpa.generate(**tiny_omni.prompt(), **GREEDY, cache_implementation="static")


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_no_ratio_outside_0_to_1(sdpa: Any, ratio: float) -> None:
    """As in the config, wherever one may stand in its place."""
    with KVCompressor("keydiff", ratio=0.5)(sdpa) as session:
        prefill = session.prefill(**tiny_omni.context())
        for call in (
            lambda: session.compress(prefill, ratio),
            lambda: session.compress(ratio=ratio, **tiny_omni.context()),
            lambda: session.extend(tiny_omni.context(), ratio=ratio),
            lambda: session.plan(prefill, ratio),
        ):
            with pytest.raises(InputError, match=r"ratio: .* is not a number from 0 to 1"):
                call()


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[20, 21, 0]], [[1, 1, 0]], "attention_mask: ends with padding in some row"),
        ([[]], None, r"needs ids \[rows, tokens\] of a question"),
        ([20, 21], None, r"needs ids \[rows, tokens\] of a question"),
    ],
)
def test_questions_that_generate_would_misread(sdpa: Any, ids: list[Any], mask: Any, message: str) -> None:
    with KVCompressor("keydiff", ratio=0.5)(sdpa) as session:
        cache = session.compress(**tiny_omni.context())
        with pytest.raises(InputError, match=message):
            session.answer(cache, torch.tensor(ids, dtype=torch.long), None if mask is None else torch.tensor(mask))


def test_a_chunk_goes_on_row_by_row(sdpa: Any) -> None:
    with KVCompressor("keydiff", ratio=0.5)(sdpa) as session:
        cache = session.compress(**tiny_omni.context())
        with pytest.raises(InputError, match="input_ids: 2 rows cannot go on from 1"):
            session.extend({"input_ids": torch.tensor([[20, 21], [22, 23]])}, cache)


@pytest.mark.parametrize(("recorded", "policy"), [("none", "h2o"), ("text", "snapkv"), ("none", "expected_attention")])
def test_a_prefill_that_recorded_too_little(sdpa: Any, recorded: Queries, policy: str) -> None:
    """Scores of rows that are not there would rank by nothing."""
    with KVCompressor(policy, ratio=0.4)(sdpa, tiny_omni.Tokenizer()) as session:
        prefill = session.prefill(queries=recorded, **tiny_omni.context())
        with pytest.raises(InputError, match="prefill: lacks queries that this policy reads"):
            session.compress(prefill)
        whole = session.compress(session.prefill(**tiny_omni.context()))
        alone = session.compress(session.prefill(queries=session.planners.policy.queries, **tiny_omni.context()))
    for one, other in zip(compressed_layers(whole), compressed_layers(alone), strict=True):
        assert torch.equal(one.keys, other.keys)


def test_no_option_and_no_mask_of_media_is_passed_over(sdpa: Any) -> None:
    """A model takes any keyword; one that nobody reads would change nothing, without a word."""
    mask = {"attention_mask": torch.ones(1, 1, 9, 9)}
    with KVCompressor("keydiff", ratio=0.5)(sdpa) as session:
        for call in (session.compress, session.prefill, lambda **options: session.extend(options)):
            with pytest.raises(InputError, match="rato: is neither an option here nor an input of Qwen2_5Omni"):
                call(**tiny_omni.context(), rato=0.3)
            with pytest.raises(InputError, match="attention_mask: of media needs shape"):
                call(**{**tiny_omni.context(), **mask})
        with pytest.raises(InputError, match="attention_mask: of media needs shape"):
            sdpa(**{**tiny_omni.prompt(), **mask})


def test_options_out_of_range_are_refused(sdpa: Any) -> None:
    compressor = KVCompressor("keydiff", ratio=0.3)
    with pytest.raises(InputError, match="lora_mode: 'fold' is not one of auto, merged, separate"):
        compressor(sdpa, lora_mode="fold")
    with compressor(sdpa) as session:
        with pytest.raises(InputError, match="'some' is not one of none, window"):
            session.prefill(queries="some", **tiny_omni.context())  # type: ignore[arg-type]
        prefill = session.prefill(**tiny_omni.context())
        with pytest.raises(InputError, match="temperature: -1 is not above 0"):
            session.plan(prefill, temperature=-1)
        with pytest.raises(InputError, match="input_ids: needs ids"):
            session.answer(session.compress(prefill), torch.zeros(0, 3, dtype=torch.long))
