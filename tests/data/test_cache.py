"""Tokenised rows on disk: the same as in memory, found again by all that decided them, and never half of them."""

import errno
import fcntl
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrlhf.config import DataConfig
from jrlhf.data import DataError, Order, cache, load, load_prompts, load_rankings, load_sft, load_texts
from jrlhf.data.columns import Encoded, Schema, Writer
from jrlhf.data.sources import open_source
from jrlhf.data.tokenizer import load_tokenizer

USER = {"role": "user", "content": "hi"}
SFT = [{"prompt": f"What is {i}?", "completion": " 42" * (1 + i % 5)} for i in range(40)]
CHATS = [{"messages": [USER, {"role": "assistant", "content": f"hello {i}"}]} for i in range(10)]
RANKED = [
    {
        "prompt": f"Q{i}",
        "completions": [f" a{k}" * (1 + i % 3) for k in range(2 + i % 3)],
        "ranks": [0, *[1] * (1 + i % 3)],
    }
    for i in range(30)
]
PAIRS = [{"prompt": f"P{i}", "chosen": " yes", "rejected": " no", "margin": i / 2} for i in range(9)]
BAD = [{"prompt": ""}, {"prompt": 5}, {"prompt": ""}]

LOADERS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "completion": (lambda *given: load_sft(*given, train_on="completion"), SFT + CHATS),
    "all": (lambda *given: load_sft(*given, train_on="all"), SFT + CHATS),
    "rankings": (load_rankings, RANKED + PAIRS),
    "prompts": (load_prompts, SFT + CHATS),
    "texts": (load_texts, RANKED + PAIRS + CHATS),
}


def everything(rows: Any) -> dict[str, Any]:
    """All that a stage can see of rows, as plain values."""
    found: dict[str, Any] = {"len": len(rows), "buckets": rows.buckets, "pad": rows.pad, "skipped": rows.skipped}
    found["cut"] = rows.cut
    found["parts"] = [tuple(part) for part in rows.parts]
    found["lengths"] = rows.lengths.tolist()
    found["tokens"] = [rows.tokens[i].tolist() for i in range(len(rows.tokens))]
    for name in ("loss_mask", "ranks", "shown"):
        if name in vars(rows):
            column = vars(rows)[name]
            found[name] = [
                x.tolist() if isinstance(x, np.ndarray) else x for x in (column[i] for i in range(len(column)))
            ]
    if "margin" in vars(rows):
        found["margin"] = rows.margin.tolist()
    order = Order(0, batch_size=7, lengths=rows.lengths, parts=rows.parts)
    batches = [rows.batch(order[step]) for step in range(2 * order.steps_per_epoch)]
    found["batches"] = [[(x.dtype, x.shape, x.tolist()) for x in batch if x is not None] for batch in batches]
    return found


def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    def each(*given: Any) -> Any:
        raise AssertionError("the rows are made anew")

    monkeypatch.setattr(load, "_encode_source", each)


@pytest.fixture
def cached(tmp_path: Path) -> DataConfig:
    return DataConfig(max_length=40, on_bad_row="skip", cache=str(tmp_path / "cache"))


def folders(config: DataConfig) -> list[Path]:
    return sorted(path for path in Path(config.cache).iterdir() if path.is_dir())


@pytest.mark.parametrize("kind", LOADERS)
def test_rows_from_the_cache_are_those_in_memory(kind, chat, cached, write, monkeypatch, caplog):
    """Of every kind: when they are made, when they are found again, and where there is no cache."""
    loader, rows = LOADERS[kind]
    source = write([*BAD, *rows])
    seen = []
    for config in (replace(cached, cache=""), cached, cached):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="jrlhf.data"):
            seen.append(everything(loader(config, source, chat)))
        seen[-1]["said"] = list(caplog.messages)
        if config.cache:
            no_tokenising(monkeypatch)
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]
    assert seen[0]["len"] == len(everything(loader(cached, source, chat))["lengths"])
    assert sum(seen[0]["skipped"].values()) == 3
    assert any(message.endswith(f"(first: {source}:1)") for message in seen[0]["said"])
    assert len(folders(cached)) == 1


def test_rows_in_the_cache_are_mapped_and_not_read(chat, cached, write):
    rows = load_sft(cached, write(SFT), chat, train_on="all")
    [folder] = folders(cached)
    for ragged, name in ((rows.tokens, "tokens"), (rows.loss_mask, "learnt")):
        [flat] = ragged._flats
        assert flat._mapped is not None
        assert flat.values.nbytes == (folder / name).stat().st_size == len(flat._mapped)
        assert not flat.values.flags.owndata
    assert not rows.lengths.flags.owndata


def test_blocks_are_written_as_they_fill_up(chat, cached, write, monkeypatch):
    """However small the block: the rows are those of one."""
    source = write(SFT)
    whole = everything(load_sft(replace(cached, cache=""), source, chat, train_on="all"))
    for values, rows in ((1, 4096), (50, 4096), (2**20, 1), (2**20, 3)):
        monkeypatch.setattr("jrlhf.data.columns.BLOCK_VALUES", values)
        monkeypatch.setattr("jrlhf.data.columns.BLOCK_ROWS", rows)
        config = replace(cached, cache=f"{cached.cache}-{values}-{rows}")
        assert everything(load_sft(config, source, chat, train_on="all")) == whole


def test_memory_does_not_grow_with_the_rows(chat, cached, write, monkeypatch):
    """Neither to make them nor to read all of them: four times the rows take a tenth more, the shown ones included."""
    monkeypatch.setattr("jrlhf.data.columns.BLOCK_ROWS", 100)
    monkeypatch.setattr("jrlhf.data.workers.CHUNK_ROWS", 10)
    sources = {rows: write([{"prompt": "hi " * 50}] * rows, f"{rows}.jsonl") for rows in (20, 300, 1200)}

    def peak(rows: int) -> int:
        tracemalloc.start()
        loaded = load_prompts(cached, sources[rows], chat)
        assert sum(len(row["prompt"]) for row in loaded.shown) == 150 * rows
        assert sum(loaded.batch([i])[1].sum() for i in range(rows)) == 40 * rows
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(20)
    assert peak(1200) < 1.1 * peak(300)


def test_several_sources_are_one_after_the_other(chat, cached, write):
    """A mixture's rows are those of its sources, and the batches of its order those of rows in one file."""
    for kind, (loader, rows) in LOADERS.items():
        first, second = write([*BAD, *rows[:25]], f"{kind}-a.jsonl"), write([*rows[25:], *BAD], f"{kind}-b.jsonl")
        whole = loader(cached, write([*BAD, *rows, *BAD], f"{kind}.jsonl"), chat)
        mixed = loader(cached, {first: 3.0, second: 1.0}, chat)
        counts = [len(loader(cached, source, chat)) for source in (first, second)]
        assert [tuple(part) for part in mixed.parts] == [(counts[0], 3.0), (counts[1], 1.0)]
        same_parts = replace(whole, parts=mixed.parts)
        assert everything(mixed) == everything(same_parts)


def test_equal_rows_have_equal_digests_however_they_come(chat, cached, write):
    """From a file or the cache, under any name, in blocks of any size; other rows or another order have others."""
    for kind, (loader, rows) in LOADERS.items():
        path, copy = write(rows, f"{kind}.jsonl"), write([*BAD, *rows], f"{kind}-copy.jsonl")
        sources = [loader(config, path, chat).sources for config in (cached, cached, replace(cached, cache=""))]
        [digest] = {source.digest for [source] in [*sources, loader(cached, copy, chat).sources]}
        assert [source.source for [source] in sources] == [path] * 3
        for others in (rows[::-1], rows[:-1], [*rows, rows[0]]):
            [other] = loader(cached, write(others, "other.jsonl"), chat).sources
            assert other.digest != digest
        [first, second] = loader(cached, {path: 1.0, copy: 2.0}, chat).sources
        assert (first.digest, first.source, second.source) == (digest, path, copy)


def test_a_digest_knows_nothing_of_blocks():
    schema = Schema(ragged={"tokens": np.int32}, flat={"learnt": np.bool_})
    rows = [Encoded({"tokens": [np.arange(n)]}, {"learnt": np.arange(n) % 2 == 0}) for n in range(1, 40)]
    digests = set()
    for size in (1, 7, 100):
        writer = Writer(schema, lambda name, values: None)
        for number, row in enumerate(rows, 1):
            writer.add(row)
            if number % size == 0:
                writer.flush()
        writer.flush()
        digests.add(writer.digest())
    assert len(digests) == 1


def test_files_of_a_pattern_are_one_source(chat, cached, tmp_path):
    for i in range(3):
        lines = "".join(json.dumps(row) + "\n" for row in [*SFT[i * 10 : (i + 1) * 10], *BAD])
        (tmp_path / f"part-{i}.jsonl").write_text(lines)
    pattern = str(tmp_path / "part-*.jsonl")
    rows = load_prompts(cached, pattern, chat)
    assert [row["prompt"] for row in rows.shown] == [row["prompt"] for row in SFT[:30]]
    assert rows.skipped == {"prompt: is empty": 6, "prompt: expected a string or a list of messages, found int": 3}
    [folder] = folders(cached)
    files = json.loads((folder / "rows.json").read_text())["key"]["files"]
    assert [path for path, *_ in files] == [str((tmp_path / f"part-{i}.jsonl").resolve()) for i in range(3)]
    (tmp_path / "part-3.jsonl").write_text(json.dumps(SFT[30]) + "\n")
    assert len(load_prompts(cached, pattern, chat)) == 31


def test_every_part_of_the_key_counts(chat, make_tokenizer, cached, write, monkeypatch):
    """Whatever changes the rows, or may, makes them anew; what does not, does not."""
    source = write(SFT)
    specials = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<pad>"}

    def made(config: DataConfig, tokenizer: Any = chat, train_on: Any = "completion", source: str = source) -> bool:
        before = len(folders(config)) if Path(config.cache).exists() else 0
        load_sft(config, source, tokenizer, train_on=train_on)
        return len(folders(config)) > before

    def again() -> bool:
        return made(cached)

    assert made(cached)
    assert not again()
    same = make_tokenizer(specials, chat.chat_template, **tokens)
    assert not made(cached, same)
    assert not made(replace(cached, buckets=2, eval="other.jsonl", train=source))
    assert made(replace(cached, max_length=39))
    assert made(replace(cached, on_bad_row="error"))
    assert made(cached, train_on="all")
    assert made(cached, train_on="assistant")
    assert made(cached, make_tokenizer(specials, chat.chat_template + " ", **tokens))
    assert made(cached, make_tokenizer([*specials, "<extra>"], chat.chat_template, **tokens))
    assert made(cached, make_tokenizer(specials, chat.chat_template, **{**tokens, "eos_token": "<|im_end|>"}))
    copy = write(SFT, "copy.jsonl")
    assert made(cached, source=copy)
    before = len(folders(cached))
    load_prompts(cached, source, chat)
    load_texts(cached, source, chat)
    assert len(folders(cached)) == before + 2
    assert not again()
    for name, value in (
        ("FORMAT_VERSION", cache.FORMAT_VERSION + 1),
        ("_code_digest", lambda: "x"),
        ("version", lambda package: "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, value)
            assert made(cached)
    stat = os.stat(source)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert again()
    Path(source).write_text(Path(source).read_text() + json.dumps(SFT[0]) + "\n")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert again()


def replaced(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows of one length in place of others, in a file of the same size and time of change."""
    import datasets

    new = path.with_name(f"new-{path.name}")
    if path.suffix == "":
        datasets.Dataset.from_list(rows).save_to_disk(new)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(new))
    elif path.suffix == ".csv":
        new.write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
    else:
        new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if path.is_dir():
        shutil.rmtree(path)
    for file in (new, *new.glob("*")):
        os.utime(file, ns=(10**18, 10**18))
    new.rename(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows"])
def test_a_file_replaced_by_one_of_its_size_and_time_is_seen(name, chat, cached, tmp_path):
    path = tmp_path / name
    seen = []
    for text in ("hello one", "hello two"):
        replaced(path, [{"text": text}])
        rows = load_sft(cached, str(path), chat, train_on="all")
        seen.append([(file, *rest[:2]) for file, *rest in cache.file_stamps(open_source(str(path)).files)])
        assert chat.decode(rows.tokens[0], skip_special_tokens=True) == text
    if path.is_file():
        assert seen[0] == seen[1]
    assert len(folders(cached)) == 2


def test_one_tokenizer_has_one_digest_whoever_loads_it(chat, tmp_path):
    """In any process, from any folder, before and after it was used."""
    chat.save_pretrained(tmp_path / "one")
    chat.save_pretrained(tmp_path / "two")
    first, second = load_tokenizer(str(tmp_path / "one")), load_tokenizer(str(tmp_path / "two"))
    digest = cache.tokenizer_digest(first)
    first(["a", "longer text"], padding=True, truncation=True, max_length=3)
    first("a")
    assert cache.tokenizer_digest(first) == cache.tokenizer_digest(second) == digest
    code = (
        "from jrlhf.data import load_tokenizer; from jrlhf.data.cache import tokenizer_digest\n"
        f"print(tokenizer_digest(load_tokenizer({str(tmp_path / 'one')!r})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == digest


def test_where_the_cache_is(tmp_path, monkeypatch):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * (cache.MIN_CACHED_BYTES - 1))
    large.write_bytes(b"x" * cache.MIN_CACHED_BYTES)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JRLHF_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.MIN_CACHED_BYTES == 4 * 2**20
    assert cache.cache_folder("auto", [small]) is None
    assert cache.cache_folder("auto", [large]) == tmp_path / ".cache" / "jrlhf"
    assert cache.cache_folder("auto", [small, small]) == tmp_path / ".cache" / "jrlhf"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_folder("auto", [large]) == Path("/xdg/jrlhf")
    monkeypatch.setenv("JRLHF_CACHE", "~/rows")
    assert cache.cache_folder("auto", [large]) == tmp_path / "rows"
    assert cache.cache_folder("~/other", [small]) == tmp_path / "other"
    assert cache.cache_folder("", [large]) is None
    assert cache.cache_folder("~/other", []) is None


def test_a_broken_off_build_leaves_nothing(chat, cached, write, monkeypatch):
    source, each = write(SFT), load._encode_source

    def broken(config: Any, opened: Any, encode: Any, writer: Any) -> Any:
        each(config, opened._replace(rows=list(opened.rows)[:20]), encode, writer)
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "_encode_source", broken)
    with pytest.raises(KeyboardInterrupt):
        load_prompts(cached, source, chat)
    assert folders(cached) == []
    monkeypatch.setattr(load, "_encode_source", each)
    assert len(load_prompts(cached, source, chat)) == 40


def test_rows_that_cannot_be_used_leave_nothing(chat, cached, write):
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: prompt: is empty; with on_bad_row: skip training leaves such rows out$"
    ):
        load_prompts(replace(cached, on_bad_row="error"), write(BAD), chat)
    with pytest.raises(DataError, match="no rows; all 3 were skipped, most for: prompt: is empty"):
        load_prompts(cached, write(BAD), chat)
    assert folders(cached) == []


def killed_build(source: str, root: str) -> str:
    """A process that dies, without a word, once 20 rows are written."""
    return f"""
import os
from jrlhf import assets
from jrlhf.config import DataConfig
from jrlhf.data import columns, load_prompts, load_tokenizer
add = columns.Writer.add
def dying(writer, row):
    if writer.rows == 20:
        writer.flush()
        os._exit(9)
    add(writer, row)
columns.Writer.add = dying
load_prompts(DataConfig(cache={root!r}), {source!r}, load_tokenizer(assets.resolve("asset:stories260k")))
"""


def test_a_killed_build_is_made_again_and_what_it_left_is_removed(metaspace, cached, write):
    source, root = write(SFT), Path(cached.cache)
    died = subprocess.run([sys.executable, "-c", killed_build(source, cached.cache)], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    [left_over] = folders(cached)
    assert left_over.name.endswith(".partial")
    assert (left_over / "tokens").stat().st_size > 0
    machine = f".{os.uname().nodename}."
    elsewhere = root / left_over.name.replace(machine, ".another-machine.")
    other_key, in_use = (root / f"prompts-{n}{machine}0.partial" for n in (1, 2))
    for path in (elsewhere, other_key, in_use):
        path.mkdir()
    with (root / "prompts-2.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = load_prompts(DataConfig(cache=str(root)), source, metaspace)
    assert len(rows) == 40
    assert [path for path in folders(cached) if path.suffix] == sorted([elsewhere, in_use])


def test_the_same_key_at_once_is_made_once_and_the_others_wait(chat, cached, write, monkeypatch, caplog):
    source, each, builds, started = write(SFT), load._encode_source, [], threading.Event()

    def slow(*given: Any) -> Any:
        builds.append(threading.get_ident())
        started.set()
        time.sleep(0.3)
        return each(*given)

    monkeypatch.setattr(load, "_encode_source", slow)
    found: list[Any] = []
    # A tokenizer each: they are not made for threads.
    threads = [
        threading.Thread(target=lambda: found.append(everything(load_prompts(cached, source, chat)))) for _ in range(2)
    ]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert len(builds) == 1
    assert found[0] == found[1]
    assert any("waiting for another process" in message for message in caplog.messages)


def test_without_locks_the_first_to_be_done_is_kept(chat, cached, write, monkeypatch):
    """Two builds of one key, one inside the other; the file system refuses locks."""
    source, each, depth = write(SFT), load._encode_source, []

    def refused(*given: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def nested(*given: Any) -> Any:
        depth.append(len(folders(cached)))
        if len(depth) == 1:
            inner.append(load_prompts(cached, source, chat))
        return each(*given)

    inner: list[Any] = []
    monkeypatch.setattr("jrlhf.data.cache.fcntl.flock", refused)
    monkeypatch.setattr(load, "_encode_source", nested)
    outer = load_prompts(cached, source, chat)
    # The second build found the first one's folder, and left it alone.
    assert depth == [1, 2]
    assert everything(outer) == everything(inner[0])
    assert len(folders(cached)) == 1


def test_a_disk_that_is_full_is_named_and_leaves_nothing(chat, cached, write, monkeypatch):
    """No file may grow beyond 100 bytes: the kernel refuses what comes after, as it does on a full disk."""
    source, limits = write(SFT), resource.getrlimit(resource.RLIMIT_FSIZE)
    # The tokenizer's own file, written for its digest, is larger.
    monkeypatch.setattr(cache, "tokenizer_digest", lambda tokenizer: "x")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(DataError) as error:
            load_prompts(cached, source, chat)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"{cached.cache}: cannot write tokenised rows here: File too large; make room, or set the data's `cache` "
        "to another folder (empty: keep rows in memory)"
    )
    assert folders(cached) == []


def test_a_folder_that_cannot_be_made_is_named(chat, write, tmp_path):
    (tmp_path / "file").write_text("")
    config = DataConfig(cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"file/cache: cannot write tokenised rows here: Not a directory; make room"):
        load_prompts(config, write(SFT), chat)


def test_a_damaged_folder_is_an_error(chat, cached, write):
    source = write(SFT)
    load_prompts(cached, source, chat)
    [folder] = folders(cached)
    size = (folder / "tokens").stat().st_size
    os.truncate(folder / "tokens", size - 4)
    with pytest.raises(DataError, match=rf"/tokens: {size - 4} bytes of {size}; remove the folder to tokenise again"):
        load_prompts(cached, source, chat)
    (folder / "tokens").unlink()
    with pytest.raises(DataError, match=r"No such file.*; remove the folder to tokenise again"):
        load_prompts(cached, source, chat)


def test_a_file_that_changes_while_it_is_read_is_an_error(chat, cached, write, monkeypatch):
    source, each = write(SFT), load._encode_source

    def touched(*given: Any) -> Any:
        skips = each(*given)
        with Path(source).open("a") as file:
            file.write(json.dumps(SFT[0]) + "\n")
        return skips

    monkeypatch.setattr(load, "_encode_source", touched)
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read; start again$"):
        load_prompts(cached, source, chat)
    assert folders(cached) == []


def test_long_sources_say_how_far_they_are(chat, cached, write, monkeypatch, caplog):
    monkeypatch.setattr(load, "PROGRESS_INTERVAL", -1.0)
    with caplog.at_level(logging.INFO, logger="jrlhf.data"):
        load_prompts(cached, write(SFT), chat)
    assert any(" 40 rows tokenised, " in message for message in caplog.messages)
