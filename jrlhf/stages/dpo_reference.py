"""Log-probs of the reference, which the DPO stage reads once and keeps in its folder."""

import io
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jrlhf.config import ModelConfig
from jrlhf.data import PreferenceRows
from jrlhf.parallel import fetch, is_first, shard_batch
from jrlhf.parallel.hosts import from_first
from jrlhf.runs.metrics import progress
from jrlhf.runs.origin_check import read_origin
from jrlhf.system.errors import UsageError, reason_of
from jrlhf.system.lines import write_bytes
from jrlhf.train.batches import covering_batches
from jrlhf.train.site import Site

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.npz"
Logprobs = dict[str, Float[np.ndarray, "N"]]
Read = Callable[[Any], jax.Array]


def reference_logprobs(
    site: Site,
    model: ModelConfig,
    rows: Mapping[str, PreferenceRows],
    read: Read,
    *,
    which: Mapping[str, Int[np.ndarray, "M"]],
    at_once: int,
    progress_bar: bool,
) -> Logprobs:
    """Return the log-prob of each completion of each of ``rows``, in the order of their rankings' tokens.

    ``which`` has the indices of those that are read; for completions of other rows the log-prob is 0. ``read`` computes
    them for a batch of ``at_once`` rows, in the shape of its ranks. They are kept in the stage's folder, with a key of
    the model, the rows and the indices: a resumed run reads the file, and other weights, rows or indices replace it.
    """
    parts = {name: of for name, of in which.items() if len(of) < len(rows[name])}
    path, key = site.folder / REFERENCE_FILE, reference_key(site, model, parts)
    sizes = {name: len(some.plain.tokens) for name, some in rows.items()}
    if from_first("look for the reference's log-probs", lambda: _stored(path, key, sizes) is not None):
        if (stored := _stored(path, key, sizes)) is None:
            raise UsageError(f"{path}: not here, but on the first process; all processes must share the run's folder")
        return stored
    found: Logprobs = {}
    total, shown = sum(map(len, which.values())), progress_bar and is_first()
    with progress(total, "Reference", start=0, enabled=shown, unit="rows", to_stderr=True) as bar:
        done = 0
        for name, some in rows.items():
            found[name] = read_logprobs(
                some,
                read,
                site.mesh,
                at_once,
                which=which[name],
                report=lambda count, before=done: bar.update(before + count),
            )
            done += len(which[name])
    if is_first():
        _store(path, key, found)
    return found


def reference_key(site: Site, model: ModelConfig, parts: Mapping[str, Int[np.ndarray, "M"]]) -> str:
    """Return the digest of all that decides the log-probs: weights, how they are used, rows and their cut.

    ``parts`` has the indices of the rows that are read where not all are.
    """
    origin = read_origin(site.stage, site.folder)
    inputs = [] if origin is None else origin.inputs
    of_model, of_rows = f"{site.stage}.model", f"{site.stage}.data."
    deciding = [
        (item.key, item.kind, item.name, item.digest)
        for item in inputs
        if (item.kind in ("weights", "config") and item.key.startswith(of_model))
        or (item.kind == "rows" and item.key.startswith(of_rows))
    ]
    # Mismatched pairs may be cut where none of the rows is.
    cut = site.config.dpo.data.max_length
    read = {name: xxhash.xxh3_128_hexdigest(np.asarray(of, np.int64).tobytes()) for name, of in parts.items()}
    given = [deciding, model.dtype, model.weights, cut, *([read] if read else [])]
    return xxhash.xxh3_128_hexdigest(json.dumps(given).encode())


def read_logprobs(
    rows: PreferenceRows,
    read: Read,
    mesh: Mesh,
    at_once: int,
    *,
    which: Int[np.ndarray, "M"],
    report: Callable[[int], None] = lambda count: None,
) -> Float[np.ndarray, "N"]:
    """Return the log-prob of each completion of the rows ``which``, 0 for completions of the others.

    ``report`` is called with the number of rows after every batch.
    """
    logprobs, done = np.zeros(len(rows.plain.tokens), np.float32), 0
    for places_of, real in covering_batches(rows.lengths[which], batch_size=at_once, limit=0):
        indices = which[places_of]
        of_batch = fetch(read(shard_batch(rows.batch(indices), mesh)))
        places = rows.rows.places(indices).reshape(of_batch.shape)
        logprobs[places[places >= 0]] = of_batch[places >= 0]
        done += int(real.sum())
        report(done)
    return logprobs


def _stored(path: Path, key: str, sizes: Mapping[str, int]) -> Logprobs | None:
    """Read the file if it is there, whole, and has this key."""
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            found = {name: np.asarray(file[name], np.float32) for name in sizes}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: damaged (%s), so the reference is read again", path, reason_of(error))
        return None
    return found if {name: len(values) for name, values in found.items()} == sizes else None


def _store(path: Path, key: str, found: Logprobs) -> None:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, key=np.asarray(key), **found)
    write_bytes(path, content.getvalue())
