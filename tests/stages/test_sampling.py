"""Several answers to each prompt of a file, however they are cut into batches."""

import json
from pathlib import Path

import pytest

from jrlhf.config import SamplingConfig
from jrlhf.config_tools import GenerateConfig
from jrlhf.stages.inference import run_generate
from jrlhf.stages.sampling import drawn_together

PROMPTS = ["Once", "Lily and Tom went to the", "One day, a little girl", "The dog", "Tim saw a big"]


@pytest.mark.parametrize(
    ("samples", "batch_size", "devices", "expected"),
    [
        (1, 16, 1, 1), (4, 16, 1, 4), (9, 16, 1, 3), (5, 16, 1, 5), (7, 16, 1, 7), (6, 16, 1, 3), (64, 16, 1, 16),
        (4, 16, 8, 2), (4, 8, 8, 1), (4, 3, 8, 1), (5, 3, 1, 1),
    ],
)  # fmt: skip
def test_as_many_answers_are_drawn_together_as_nearly_fill_a_device_s_rows(
    samples: int, batch_size: int, devices: int, expected: int
) -> None:
    assert drawn_together(samples, batch_size=batch_size, devices=devices) == expected


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


@pytest.mark.parametrize(("samples", "batch_size"), [(3, 24), (4, 16), (5, 3)])
def test_each_prompt_gets_its_own_answers(tmp_path: Path, samples: int, batch_size: int) -> None:
    greedy = drawn(tmp_path, samples=1, batch_size=16, temperature=0.0)
    assert len({answer for (answer,) in greedy}) == len(PROMPTS)
    again = drawn(tmp_path, samples=samples, batch_size=batch_size, temperature=0.0)
    assert again == [answers * samples for answers in greedy]
    free = drawn(tmp_path, samples=samples, batch_size=batch_size, temperature=1.0)
    assert all(len(set(answers)) > 1 for answers in free), "each is a draw of its own"
