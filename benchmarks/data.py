"""Measures large data: rows tokenised per second, seconds to the first batch, and memory. Prints a JSON line each.

    python benchmarks/data.py --rows 200000 2000000 --model FOLDER --out /tmp/data

It writes each number of rows as JSONL (random combinations of the shipped film-review sentences) and starts a new
process for each figure: ``first`` builds the cache, ``second`` uses it, ``epoch`` uses it for all batches of an epoch,
and ``memory`` (with ``--memory``) holds all rows in memory instead.
"""

import argparse
import datetime
import json
import platform
import random
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

FORMS = {
    "text": lambda first, rest: {"text": f"{first} {rest}"},
    "completion": lambda first, rest: {"prompt": first, "completion": f" {rest}"},
    "chat": lambda first, rest: {
        "messages": [{"role": "user", "content": first}, {"role": "assistant", "content": rest}]
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--form", default="completion", choices=FORMS)
    parser.add_argument("--model", default="asset:stories260k", help="folder or hub id of the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows and the cache")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--memory", action="store_true", help="also measure all rows in memory, without a cache")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args.child, args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for rows in args.rows:
        path = args.out / f"{args.form}-{rows}.jsonl"
        write_rows(path, rows, args.form)
        # A new modification time gives a new cache key, so caches of earlier calls do not count.
        for what in ["first", "second", "epoch"] + ["memory"] * args.memory:
            report(args, path, rows, what)


def write_rows(path: Path, rows: int, form: str) -> None:
    """Return a prompt of one sentence and an answer of one to eight."""
    from jrlhf import assets

    with open(assets.resolve("asset:sft_train"), encoding="utf-8") as lines:
        sentences = [json.loads(line)["text"] for line in lines]
    draw = random.Random(rows)
    with path.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            row = FORMS[form](draw.choice(sentences), " ".join(draw.choices(sentences, k=draw.randint(1, 8))))
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def report(args: argparse.Namespace, path: Path, rows: int, what: str) -> None:
    """Run one figure in a new process and print its line."""
    from common import cpu_name

    child = [sys.executable, __file__, "--child", what, "--rows", str(rows), "--form", args.form]
    child += ["--model", args.model, "--out", str(args.out), "--batch", str(args.batch)]
    began = time.time()
    found = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)
    line = {
        "figure": f"{what} start, {rows} rows" if what in ("first", "second") else f"{what}, {rows} rows",
        "value": round(found.pop("ready") - began, 2),
        "unit": "seconds to the first batch, from the start of the process",
        **found,
        "source_mb": path.stat().st_size // 2**20,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("tokenizers", "transformers", "numpy")},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(line), flush=True)


def measure(what: str, args: argparse.Namespace) -> None:
    """Measure in the child process from its start to the first batch, or for ``epoch`` to the last."""
    from jrlhf import assets
    from jrlhf.config import DataConfig
    from jrlhf.data import Order, load_sft, load_tokenizer

    [rows] = args.rows
    path, cache = args.out / f"{args.form}-{rows}.jsonl", args.out / "cache"
    tokenizer = load_tokenizer(assets.resolve(args.model))
    # Loading a tokenizer takes more memory than holding it; from here on the peak is that of the rows.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    found: dict[str, float] = {"memory_before_mb": peak()}
    config = DataConfig(cache="" if what == "memory" else str(cache))
    start = time.perf_counter()
    loaded = load_sft(config, str(path), tokenizer, train_on="completion")
    found["seconds_rows"] = round(time.perf_counter() - start, 2)
    order = Order(0, batch_size=args.batch, lengths=loaded.lengths, parts=loaded.parts)
    loaded.batch(order[0])
    found |= {"ready": time.time(), "memory_at_first_batch_mb": peak(), "tokens": int(loaded.lengths.sum())}
    if what in ("first", "memory"):
        found["rows_per_second"] = round(rows / found["seconds_rows"])
    if what == "first":
        folder = max((path for path in cache.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        found["cache_mb"] = sum(file.stat().st_size for file in folder.iterdir()) // 2**20
    if what == "epoch":
        start = time.perf_counter()
        for step in range(order.steps_per_epoch):
            loaded.batch(order[step])
        found["batches_per_second"] = round(order.steps_per_epoch / (time.perf_counter() - start))
        found["memory_after_epoch_mb"] = peak()
    print(json.dumps(found))


def peak() -> int:
    """Return the peak memory of this process in MB; getrusage could return the larger peak of its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) // 1024


if __name__ == "__main__":
    main()
