"""Examine every decoder of the installed transformers as a tiny random instance, and write the table of the docs.

    python -m benchmarks.sweep_models [--output docs/models-sweep.md] [--journal sweep.jsonl] [--part 1/2] [CLASS ...]

Each class runs in a process of its own. A journal takes the outcomes as they come; a class that is in it is not run
again, and parts that share one are joined by the run that writes the table.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import transformers

from tests.support.model_sweep import Outcome, class_names, examine_apart

HEAD = """# Which decoders are served

Every `*ForCausalLM` and `*ForConditionalGeneration` class of transformers {version}, as a tiny random instance, is
either compressed **right** or **refused** in one line before anything is answered. Right means: at ratio 1 equal to the
plain model; at ratio 0.3, with `when: context` and `when: prompt`, equal to 1e-5 of the largest logit (float32) to an
eager copy of the model whose later tokens do not see what was evicted. The prompts are embeddings (or token ids) with
`modality_ids`; towers are built and do not run. `python -m benchmarks.sweep_models` makes this table anew; a few towers
need timm and scipy to be built.

| right | refused | neither | not built |
|---|---|---|---|
| {right} | {refused} | {neither} | {unbuilt} |
"""


def report(outcomes: list[Outcome]) -> str:
    """The page."""
    counts = Counter(outcome.kind for outcome in outcomes)
    head = HEAD.format(
        version=transformers.__version__,
        right=counts["right"],
        refused=counts["refused"],
        neither=counts["neither"],
        unbuilt=counts["not built"],
    )
    parts = [head]
    for kind, column in (("right", "compressed"), ("refused", "why"), ("neither", "what"), ("not built", "why")):
        rows = sorted((o.name, _cell(o.detail)) for o in outcomes if o.kind == kind)
        if rows:
            parts.append(f"\n## {kind.capitalize()}\n\n| class | {column} |\n|---|---|\n")
            parts += [f"| {name} | {detail} |\n" for name, detail in rows]
    return "".join(parts)


def _cell(detail: str) -> str:
    detail = detail.removeprefix("model: ").partition("; supported model types")[0]
    return detail.partition("cannot use the generic one: ")[2] or detail.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", help="to examine; all without any")
    parser.add_argument("--output", type=Path, default=Path("docs/models-sweep.md"), help="page to write")
    parser.add_argument("--journal", type=Path, default=Path("runs/sweep.jsonl"), help="file of outcomes")
    parser.add_argument("--part", default="1/1", help="examine every n-th class only, and write no page")
    options = parser.parse_args()
    names = options.classes or class_names()
    part, parts = map(int, options.part.split("/"))
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if options.journal.exists():
        done = {line["name"]: Outcome(**line) for line in map(json.loads, options.journal.read_text().splitlines())}
    for name in names[part - 1 :: parts]:
        if name not in done:
            done[name] = examine_apart(name)
            with options.journal.open("a") as journal:
                journal.write(json.dumps(asdict(done[name])) + "\n")
            print(done[name].kind, name, _cell(done[name].detail), flush=True)
    if parts == 1:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report([done[name] for name in names]), encoding="utf-8")


if __name__ == "__main__":
    main()
