"""Several answers to each prompt of a file, however they are cut into batches."""

import json
from pathlib import Path

import pytest

from jrlhf.config import SamplingConfig
from jrlhf.config_tools import GenerateConfig
from jrlhf.stages.inference import run_generate

PROMPTS = ["Once", "Lily and Tom went to the", "One day, a little girl", "The dog", "Tim saw a big"]


def drawn(tmp_path: Path, *, samples: int, batch_size: int, temperature: float) -> list[list[str]]:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    sampling = SamplingConfig(max_new_tokens=8, temperature=temperature)
    run_generate(
        GenerateConfig(
            "asset:stories260k", str(prompts), out=str(out), samples=samples, batch_size=batch_size, sampling=sampling
        )
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    return [row["completions"] for row in rows]


@pytest.mark.parametrize(("samples", "batch_size"), [(3, 6), (4, 2), (5, 3)])
def test_each_prompt_gets_its_own_answers(tmp_path: Path, samples: int, batch_size: int) -> None:
    greedy = drawn(tmp_path, samples=1, batch_size=16, temperature=0.0)
    assert len({answer for (answer,) in greedy}) == len(PROMPTS)
    again = drawn(tmp_path, samples=samples, batch_size=batch_size, temperature=0.0)
    assert again == [answers * samples for answers in greedy]
    free = drawn(tmp_path, samples=samples, batch_size=batch_size, temperature=1.0)
    assert all(len(set(answers)) > 1 for answers in free), "each is a draw of its own"
