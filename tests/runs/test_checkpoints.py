"""Checkpoints: bit for bit, onto any mesh, whole or not at all."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jrlhf.parallel import init_sharded, make_mesh, tree_shardings
from jrlhf.parallel.compilation import counted_compilations
from jrlhf.runs.checkpoints import CheckpointError, Checkpoints
from jrlhf.runs.lock import RunLocked, run_lock
from jrlhf.runs.manifest import write_manifest
from jrlhf.types import PPOParams, TrainState
from tests.support import ROOT

RULES = (("w$", PartitionSpec("fsdp", "tensor")),)


def open_checkpoints(folder: Path, **changes: Any) -> Checkpoints:
    options: dict[str, Any] = {"keep": 2, "keep_best": 0, "best_metric": None, "best_mode": "min"}
    return Checkpoints(folder, **(options | changes))


def make_state(key: jax.Array) -> dict[str, Any]:
    """Actor, critic, Adam's moments, an empty subtree, a bfloat16 leaf, a counter and typed keys of two kinds."""
    policy, value = (
        {"w": jax.random.normal(k, (16, 8)), "b": jnp.ones((8,), jnp.bfloat16)} for k in jax.random.split(key)
    )
    params = PPOParams(policy, value)
    train = TrainState(params, optax.adam(1e-3).init(params), jnp.int32(7))
    return {"train": train, "key": jax.random.key(5), "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3)}


def bits(tree: Any) -> list[bytes]:
    """Every leaf's memory."""
    raw = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)]
    return [np.asarray(x).tobytes() for x in raw]


def abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_save_of_what_all_devices_hold_compiles_nothing(tmp_path: Path) -> None:
    everywhere = jax.sharding.NamedSharding(make_mesh(data=8, fsdp=1, tensor=1), PartitionSpec())
    state = jax.device_put({"w": jnp.arange(24.0).reshape(3, 8), "b": jnp.arange(16.0)}, everywhere)
    with open_checkpoints(tmp_path / "ck") as checkpoints:
        with counted_compilations() as compilations:
            checkpoints.save(1, state, metadata={}, metrics=None)
            checkpoints.wait()
        assert compilations.programs == 0
        assert bits(checkpoints.restore(1, state)) == bits(state)


def test_a_state_comes_back_bit_for_bit_with_its_structure_and_metadata(tmp_path: Path) -> None:
    state = make_state(jax.random.key(0))
    with open_checkpoints(tmp_path / "ck") as checkpoints:
        assert checkpoints.latest_step() is None
        assert not (tmp_path / "ck").exists(), "looking must not leave a folder behind"
        checkpoints.save(3, state, metadata={"tokens": 12, "name": "ä"}, metrics=None)
    with open_checkpoints(tmp_path / "ck") as checkpoints:
        assert checkpoints.latest_step() == 3
        assert checkpoints.metadata(3) == {"tokens": 12, "name": "ä"}
        restored = checkpoints.restore(3, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert restored["key"].dtype == state["key"].dtype
    assert jax.random.key_impl(restored["keys"]) == jax.random.key_impl(state["keys"])
    # The key goes on where it was, too.
    assert bits(jax.random.normal(restored["key"], (4,))) == bits(jax.random.normal(state["key"], (4,)))


def test_another_mesh_changes_no_bit(tmp_path: Path) -> None:
    meshes = [
        make_mesh(data=2, fsdp=2, tensor=2),
        make_mesh(data=1, fsdp=8, tensor=1),
        make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]),
    ]
    state = init_sharded(make_state, jax.random.key(0), mesh=meshes[0], rules=RULES)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metadata={}, metrics=None)
        for mesh in meshes:
            shardings = tree_shardings(state, mesh, RULES)
            restored = checkpoints.restore(1, abstract(state, shardings))
            assert bits(restored) == bits(state)
            assert all(
                x.sharding.is_equivalent_to(s, x.ndim)
                for x, s in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True)
            )


def test_a_part_is_read_alone(tmp_path: Path) -> None:
    state = make_state(jax.random.key(0))
    policy = state["train"].params.policy
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metadata={}, metrics=None)
        assert bits(checkpoints.restore(1, policy, part="train/params/policy")) == bits(policy)
        with pytest.raises(CheckpointError, match="train/params/policy/w is in the checkpoint only"):
            checkpoints.restore(1, {"b": policy["b"]}, part="train/params/policy")
        with pytest.raises(CheckpointError, match="train/nothing/w is not in the checkpoint"):
            checkpoints.restore(1, policy, part="train/nothing")


def test_the_saved_state_may_be_donated_at_once(tmp_path: Path) -> None:
    state = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    expected = bits(state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: -x - 1.0, tree), donate_argnums=0)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metadata={}, metrics=None)
        for _ in range(3):
            state = jax.block_until_ready(overwrite(state))
        assert bits(checkpoints.restore(1, state)) == expected


def test_leaves_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = make_state(jax.random.key(0))
    train = state["train"]
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metadata={}, metrics=None)

        def message(like: Any) -> str:
            with pytest.raises(CheckpointError) as caught:
                checkpoints.restore(1, like)
            return str(caught.value)

        assert "extra is not in the checkpoint" in message(state | {"extra": jnp.int32(0)})
        assert "keys is in the checkpoint only" in message({k: v for k, v in state.items() if k != "keys"})
        policy = train.params.policy
        renamed = message(state | {"train": train._replace(params=PPOParams({"v": policy["w"], "b": policy["b"]}, {}))})
        assert "train/params/policy/v is not in the checkpoint" in renamed
        assert "train/params/policy/w is in the checkpoint only" in renamed
        reshaped = message(state | {"train": train._replace(step=jnp.zeros((2,), jnp.int32))})
        assert "train/step is int32[] there and int32[2] here" in reshaped
        retyped = message(state | {"train": train._replace(step=jnp.float32(7))})
        assert "train/step is int32[] there and float32[] here" in retyped
        with pytest.raises(TypeError, match="state leaf cursor is a int"):
            checkpoints.save(2, {"cursor": 3}, metadata={}, metrics=None)


def step_folders(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.mark.parametrize(
    ("mode", "kept", "best"), [("min", [2, 5, 6], 2), ("max", [1, 5, 6], 1)], ids=["smaller", "larger"]
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, mode: str, kept: list[int], best: int) -> None:
    state = {"w": jnp.ones((4,))}
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.5, 6: None}
    options = {"keep": 2, "keep_best": 1, "best_metric": "nll", "best_mode": mode}
    with open_checkpoints(tmp_path, **options) as checkpoints:
        for step, value in values.items():
            checkpoints.save(step, state, metadata={}, metrics=None if value is None else {"nll": value, "other": 0.0})
        assert checkpoints.best_step() == best
    assert step_folders(tmp_path) == kept
    # What was best is remembered by the folder, not by the process.
    with open_checkpoints(tmp_path, **options) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (best, 6)
        checkpoints.save(7, state, metadata={}, metrics={"nll": 2.0})
    assert step_folders(tmp_path) == sorted({best, 6, 7})


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="best_metric"):
        open_checkpoints(tmp_path, keep_best=1)
    with pytest.raises(ValueError, match="at least 1"):
        open_checkpoints(tmp_path, keep=0)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, {"w": jnp.ones((4,))}, metadata={}, metrics=None)
        for step in (4, 3):
            with pytest.raises(ValueError, match=f"step {step} is not newer"):
                checkpoints.save(step, {"w": jnp.ones((4,))}, metadata={}, metrics=None)
        with pytest.raises(CheckpointError, match="9"):
            checkpoints.restore(9, {"w": jnp.ones((4,))})
        with pytest.raises(CheckpointError, match="9"):
            checkpoints.metadata(9)


def until_it_ends(checkpoints: Checkpoints) -> None:
    """What a training loop does: look, and go on."""
    for _ in range(1000):
        checkpoints.surface()
        time.sleep(0.01)


@pytest.mark.parametrize("surface", ["save", "wait", "surface", "close"])
def test_a_failed_background_save_is_an_error_and_costs_no_older_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surface: str
) -> None:
    state = {"w": jnp.ones((4,))}
    checkpoints = open_checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, metadata={"n": 1}, metrics=None)
    checkpoints.wait()

    def disk_is_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    surfaces = {
        "save": lambda: checkpoints.save(3, state, metadata={"n": 3}, metrics=None),
        "wait": checkpoints.wait,
        "surface": lambda: until_it_ends(checkpoints),
        "close": checkpoints.close,
    }
    with monkeypatch.context() as patch:
        # The last thing a background save does is to rename its temporary folder.
        patch.setattr("os.rename", disk_is_full)
        patch.setattr("os.replace", disk_is_full)
        checkpoints.save(2, state, metadata={"n": 2}, metrics=None)
        with pytest.raises(CheckpointError, match="No space left"):
            surfaces[surface]()
    if surface != "close":
        assert checkpoints.latest_step() == 1, "the older step is still there and known"
        checkpoints.save(3, state, metadata={"n": 3}, metrics=None)
        assert checkpoints.metadata(3) == {"n": 3}
        checkpoints.close()
        assert step_folders(tmp_path) == [3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_the_step_alone(small_disk: Path) -> None:
    small, large = {"w": jnp.ones((1000,))}, {"w": jax.random.normal(jax.random.key(0), (1_000_000,))}
    with open_checkpoints(small_disk, keep=1) as checkpoints:
        checkpoints.save(1, small, metadata={}, metrics=None)

        def save_large() -> None:
            checkpoints.save(2, large, metadata={}, metrics=None)
            until_it_ends(checkpoints)

        with pytest.raises(CheckpointError, match=rf"saved to {small_disk}.*(?i:no space left|resource_exhausted)"):
            save_large()
        assert checkpoints.newest_sound_step() == 1
        # Room again: the next one is saved, and what was left of the failed one is gone.
        checkpoints.save(3, small, metadata={}, metrics=None)
        assert checkpoints.newest_sound_step() == 3
    assert step_folders(small_disk) == [3]


def test_a_folder_that_became_read_only_is_an_error_at_once(small_disk: Path) -> None:
    state = {"w": jnp.ones((1000,))}
    with open_checkpoints(small_disk) as checkpoints:
        checkpoints.save(1, state, metadata={}, metrics=None)
        checkpoints.wait()
        for mode in ("ro", "rw"):
            subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)
            if mode == "ro":
                with pytest.raises(CheckpointError, match=r"step 2 was not saved .*Read-only"):
                    checkpoints.save(2, state, metadata={}, metrics=None)
                assert checkpoints.newest_sound_step() == 1
        checkpoints.save(2, state, metadata={}, metrics=None)
        assert checkpoints.newest_sound_step() == 2


MANY_SAVES = """
    import gc, os, pathlib, sys, threading
    import jax, jax.numpy as jnp
    from jrlhf.runs.checkpoints import Checkpoints
    state = {"w": jax.random.normal(jax.random.key(0), (500_000,)), "key": jax.random.key(1)}

    def held():
        gc.collect()
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()

    with Checkpoints(pathlib.Path(sys.argv[1]), keep=2, keep_best=1, best_metric="nll", best_mode="min") as saved:
        for step in range(200):
            saved.save(step, state, metadata={}, metrics={"nll": 1.0})
            if step % 50 == 49:
                saved.wait()
                print(*held(), flush=True)
"""


@pytest.mark.slow
def test_two_hundred_saves_leak_nothing(tmp_path: Path) -> None:
    out, err = run_python(MANY_SAVES, str(tmp_path)).communicate(timeout=600)
    memory, files, threads = zip(*(map(float, line.split()) for line in out.splitlines()), strict=True)
    assert len(memory) == 4, err
    # 100 saves after the first 100: 200 MB are written; what malloc keeps for the next save is a few.
    assert memory[3] - memory[1] < 8, memory
    assert (files[3], threads[3]) == (files[0], threads[0])


SAVE_AND_DIE = """
    import os, pathlib, signal, sys, threading, time
    import jax, jax.numpy as jnp
    from jrlhf.runs.checkpoints import Checkpoints
    folder = pathlib.Path(sys.argv[1])
    checkpoints = Checkpoints(folder, keep=1, keep_best=0, best_metric=None, best_mode="min")
    checkpoints.save(1, {"w": jnp.ones((4,))}, metadata={}, metrics=None)
    checkpoints.wait()

    def die():
        while not any("partial" in path.name for path in folder.iterdir()):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die).start()
    checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (6_000_000,))}, metadata={}, metrics=None)
    time.sleep(60)
"""


def test_a_step_that_was_being_written_at_kill_9_is_never_picked(tmp_path: Path) -> None:
    """Nor does it cost the one before, where one alone is kept."""
    process = run_python(SAVE_AND_DIE, str(tmp_path))
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert any("partial" in path.name for path in tmp_path.iterdir()), "the kill came in mid-save"
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert any("partial" in path.name for path in tmp_path.iterdir()), "a reader deletes nothing"
        checkpoints.save(2, {"w": jnp.ones((4,))}, metadata={}, metrics=None)
    assert step_folders(tmp_path) == [1, 2], "what was left over is cleared by the next save"


def saved_steps(folder: Path, *steps: int) -> dict[str, jax.Array]:
    """Those steps of one small state."""
    state = {"w": jax.random.normal(jax.random.key(0), (3000,)), "key": jax.random.key(4)}
    with open_checkpoints(folder, keep=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state, metadata={"n": step}, metrics={"nll": 1.0})
    return state


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_file_of_a_step_is_vouched_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each file cut, removed and changed: named, set aside whole, and the step before is used, with a warning."""
    saved_steps(tmp_path / "sound", 1, 2)
    names = [path.relative_to(tmp_path / "sound" / "2") for path in files_of(tmp_path / "sound" / "2")]
    assert len(names) > 5
    for number, name in enumerate(names):
        for wrong in ("cut", "removed", "changed"):
            folder = tmp_path / f"{number}-{wrong}"
            shutil.copytree(tmp_path / "sound", folder)
            file = folder / "2" / name
            content = file.read_bytes()
            if wrong == "removed":
                file.unlink()
            else:
                file.write_bytes(content[:-1] if wrong == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
            caplog.clear()
            with open_checkpoints(folder) as checkpoints:
                with pytest.raises(CheckpointError, match=name.name):
                    checkpoints.check(2)
                assert checkpoints.newest_sound_step() == 1
                assert checkpoints.latest_step() == 1
                assert checkpoints.metadata(1) == {"n": 1}
            [warning] = caplog.messages
            assert f"checkpoint {folder / '2'} is damaged ({name}" in warning
            assert warning.endswith(f"set aside in {folder / 'damaged' / '2'}; resuming from step 1")
            assert len(files_of(folder / "damaged" / "2")) == len(names) - (wrong == "removed")


def test_a_thousand_flipped_bits_are_found(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1)
    files = files_of(tmp_path / "1")
    random = np.random.default_rng(0)
    with open_checkpoints(tmp_path) as checkpoints:
        for _ in range(1000):
            file = files[random.integers(len(files))]
            at, bit = random.integers(file.stat().st_size), 1 << random.integers(8)
            with file.open("r+b") as opened:
                opened.seek(at)
                [before] = opened.read(1)
                opened.seek(at)
                opened.write(bytes([before ^ bit]))
            with pytest.raises(CheckpointError, match=re.escape(file.name)):
                checkpoints.check(1)
            with file.open("r+b") as opened:
                opened.seek(at)
                opened.write(bytes([before]))
        checkpoints.check(1)


def test_with_no_sound_step_left_nothing_starts_over(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1, 2)
    for step in (1, 2):
        os.truncate(tmp_path / str(step) / "manifest.json", 40)
    for _ in range(2):  # nor the next time, when there is no step any more
        with (
            open_checkpoints(tmp_path) as checkpoints,
            pytest.raises(CheckpointError, match="no checkpoint can be used"),
        ):
            checkpoints.newest_sound_step()
    assert step_folders(tmp_path / "damaged") == [1, 2]
    with open_checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.newest_sound_step() is None


def test_a_step_that_an_earlier_version_wrote_is_read() -> None:
    """``fixtures/format-1`` was written when format 1 was new, and stays as it is."""
    expected = {
        "w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 3,
        "half": jnp.ones((2,), jnp.bfloat16),
        "key": jax.random.key(5),
    }
    with open_checkpoints(ROOT / "tests" / "fixtures" / "format-1") as checkpoints:
        assert checkpoints.newest_sound_step() == 7
        assert checkpoints.metadata(7) == {"tokens": 12}
        assert bits(checkpoints.restore(7, expected)) == bits(expected)


def test_a_step_of_another_format_is_left_where_it_is(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1)
    write_manifest(tmp_path / "1", form=99)
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="has format 99"):
        checkpoints.newest_sound_step()
    assert step_folders(tmp_path) == [1]


HOLD = """
    import pathlib, sys, time
    from jrlhf.runs.lock import run_lock
    with run_lock(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(120)
"""


def test_a_run_folder_belongs_to_one_live_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = run_python(HOLD, str(folder))
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=rf"in use by process {other.pid}$"), run_lock(folder):
            pass
    finally:
        other.kill()
        other.communicate()
    # The kernel gave the lock back; and it can be taken again and again.
    for _ in range(2):
        with run_lock(folder):
            assert (folder / ".lock").read_text() == f"{os.getpid()}\n"
            with pytest.raises(RunLocked, match=str(os.getpid())), run_lock(folder):
                pass
