"""The Markdown page of rollouts.py."""

from pathlib import Path

from peers.cases import ROLLOUTS, batch_occupancy, spec
from peers.page import Run, spread, table, write_page
from peers.results import Result, SideResult

HEADER = (
    "| work | side | figure | seconds a call (low to high) | jrlhf is times as fast (low to high) "
    "| occupancy: in all, until no prompt waits | memory of the program, MB |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
)
GROWTH_HEADER = (
    "| prompts | tokens | seconds a call (low to high) | tokens/s | occupancy: in all, until no prompt waits "
    "| memory of the program, MB |\n| ---: | ---: | ---: | ---: | ---: | ---: |\n"
)
NOTES = """\
- Each side is a process of its own, started once a case; rounds go A B C A B C, and only one side works at a time.
  Seconds are medians of all timed calls, after two that are not counted. A ratio is of the medians within a round;
  given is the median of the rounds.
- Equal on all sides: sizes of the Llama (random weights), tokens of the prompts, and the length of each answer:
  log-normal with sigma 0.7, a quarter of the limit in the middle, in one order. Sampling at temperature 1.
- jrlhf says the stop token where an answer's length is reached; vLLM is given the length as `max_tokens`, Hugging Face
  as a stopping criterion, Tunix as jrlhf. jrlhf and vLLM return the log-prob of each token, the others none.
- Hugging Face, Tunix and jrlhf before draw a batch of as many answers as there are slots, then the next one; a batch
  ends with its longest answer.
- Occupancy is the share of slots, over all decoding steps, in which a token was drawn. Of batches it follows from the
  lengths; vLLM does not say it.
- The memory of the program is what XLA allocates for it besides arguments and results: cache, prompts that are
  read, and temporary arrays.
"""


def write(path: Path, run: Run, results: list[Result], growth: dict[int, SideResult]) -> None:
    """The whole page, anew."""
    grown = f"## Growth with the number of prompts\n\n{growth_table(growth)}\n" if growth else ""
    title = "Rollouts with answers of ragged lengths"
    write_page(path, run, results, title=title, tables=case_table(results), notes=NOTES, after=grown)


def case_table(results: list[Result]) -> str:
    return table(HEADER, results, lambda result, side: [occupancy(result, side), program(result.sides[side])])


def occupancy(result: Result, side: str) -> str:
    last = result.sides[side].lines[-1]
    if "occupancy" in last:
        return f"{last['occupancy']:.0%}, {last['occupancy_of_queue']:.0%}"
    in_batches = result.case.work in ROLLOUTS and side != "vllm"
    return f"{batch_occupancy(spec(result.case)):.0%}" if in_batches else ""


def program(found: SideResult) -> str:
    megabytes = found.lines[-1].get("program_mb")
    return "" if megabytes is None else f"{megabytes:,.0f}"


def growth_table(growth: dict[int, SideResult]) -> str:
    rows = []
    for prompts, found in growth.items():
        last, seconds = found.lines[-1], found.seconds()
        rate = f"{last['tokens'] / seconds.median:,.0f}"
        occupied = f"{last['occupancy']:.0%}, {last['occupancy_of_queue']:.0%}"
        cells = [str(prompts), f"{last['tokens']:,}", spread(seconds, 3), rate, occupied, program(found)]
        rows.append(f"| {' | '.join(cells)} |\n")
    return GROWTH_HEADER + "".join(rows)
