"""Plans: a state to the byte, memory that falls as devices grow, a batch that fits and one that does not."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import pytest

from jrlhf import assets
from jrlhf.config import (
    ConfigError,
    DataConfig,
    DPOConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
)
from jrlhf.models import load_pretrained, reward_from_pretrained
from jrlhf.models.cache import CacheKind
from jrlhf.parallel.devices.topology import Topology, parse_topology
from jrlhf.plan import run as plan_run
from jrlhf.plan import run_plan
from jrlhf.plan.parts import StageFigures
from jrlhf.plan.programs import Figures, cache_bytes, compile_program, program_figures
from jrlhf.plan.run import fitting_rows, plan_stage, planned_target
from jrlhf.stages.dpo import plan_dpo
from jrlhf.stages.ppo import plan_ppo
from jrlhf.stages.reward import plan_reward
from jrlhf.stages.sft import plan_sft
from jrlhf.train.keys import stream_key
from jrlhf.train.lora import trainable
from jrlhf.train.optim import make_actor_critic_optimizer, make_optimizer
from jrlhf.train.programs import Sized, Target, device_bytes, planned_model
from jrlhf.train.start import begin, build_training
from jrlhf.types import PPOParams

CONFIG = PlanConfig(
    topology="cpu:8",
    compile="simulated",
    mesh=MeshConfig(fsdp=4),
    sft=SFTConfig(
        model=ModelConfig(path="asset:stories260k"), data=DataConfig(train="absent.jsonl", max_length=32), batch_size=16
    ),
    reward=RewardConfig(data=DataConfig(max_length=32)),
    dpo=DPOConfig(data=DataConfig(max_length=32)),
    ppo=PPOConfig(
        prompts=DataConfig(max_length=16), sampling=SamplingConfig(max_new_tokens=8), episodes=16, microbatch=1
    ),
)
MODEL = assets.resolve("asset:stories260k")
LORA = LoRAConfig(rank=4, targets="q_proj")


@pytest.fixture(autouse=True, scope="module")
def all_devices() -> None:
    """JAX starts with the eight of the tests, and not with as many as the first plan asks for."""
    assert jax.device_count() == 8


def spread(tree) -> int:
    """Bytes of real arrays on the first device."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
    first = jax.devices()[0]
    return sum(s.data.nbytes for leaf in leaves.values() for s in leaf.addressable_shards if s.device == first)


def never(state, batch, key):
    raise AssertionError("nothing is run")


STATES = [
    ("sft", LoRAConfig(), "float32"),
    ("sft", LORA, "bfloat16"),
    ("reward", LORA, "float32"),
    ("dpo", LoRAConfig(), "float32"),
    ("dpo", LORA, "bfloat16"),
    ("ppo", LoRAConfig(), "float32"),
    ("ppo", LoRAConfig(), "bfloat16"),
    ("ppo", LORA, "bfloat16"),
]


@pytest.mark.parametrize(("kind", "lora", "dtype"), STATES)
def test_a_planned_state_has_the_bytes_of_a_real_one(
    kind: str, lora: LoRAConfig, dtype: Literal["float32", "bfloat16"]
) -> None:
    """In bfloat16 the weights that are not trained are in bfloat16."""
    model = ModelConfig("asset:stories260k", dtype=dtype)
    sections = CONFIG.sft, CONFIG.reward, CONFIG.dpo, CONFIG.ppo
    sft, reward, dpo, ppo = (replace(part, lora=lora, model=model) for part in sections)
    ppo = replace(ppo, reward=replace(model, path=""))
    config = replace(CONFIG, sft=sft, reward=reward, dpo=dpo, ppo=replace(ppo, ema_decay=0.9))
    site = planned_target(config)
    make = {"sft": plan_sft, "reward": plan_reward, "dpo": plan_dpo, "ppo": plan_ppo}[kind]
    held = make(config, site).build(1).held

    weights = "auto" if kind == "ppo" or lora.rank else "float32"
    base = load_pretrained(MODEL, dtype=dtype, mesh=site.mesh, weights=weights)
    critic = reward_from_pretrained(base, jax.random.key(0))
    tx, _ = make_optimizer(config.sft.optim, updates=9)
    more = {}
    match kind:
        case "sft" | "dpo":
            trained, frozen = trainable(base, lora, jax.random.key(0), mesh=site.mesh, path="lora")
            loaded = ()
        case "reward":
            trained, frozen = trainable(critic, lora, jax.random.key(0), mesh=site.mesh, path="lora")
            loaded = ()
        case _:
            # The reward model of a run has weights of its own.
            own = load_pretrained(MODEL, dtype=dtype, mesh=site.mesh, weights=weights)
            critic = reward_from_pretrained(own, jax.random.key(0))
            at = {"mesh": site.mesh, "path": "lora", "shared": True}
            halves = [trainable(m, lora, jax.random.key(0), **at) for m in (base, critic)]
            trained = PPOParams(halves[0][0], halves[1][0])
            frozen = PPOParams(halves[0][1], halves[1][1]) if lora.rank else None
            loaded = base.params, critic.params
            tx, _ = make_actor_critic_optimizer(config.ppo.optim, value_lr=0.0, updates=9)
            more = {"ema": trained.policy}
    training = build_training(never, tx, trained, frozen, mesh=site.mesh, rules=base.rules, **more)
    state = begin(training, mesh=site.mesh, key=stream_key(0, "sft", "train"))

    real = {"trained": state.train.params, "optimizer": state.train.opt_state, "average": state.train.ema}
    assert {name: device_bytes(held[name]) for name in real} == {name: spread(tree) for name, tree in real.items()}
    # The head of a fresh reward model is on one device until training begins: it is the first.
    assert device_bytes(held["loaded"]) == spread((loaded, frozen))
    assert (device_bytes(held["trained"]) < device_bytes(held["loaded"]) / 2) == bool(lora.rank)


def planned(config: PlanConfig) -> dict[str, StageFigures]:
    return {stage.name: stage for stage in run_plan(config)}


def test_every_stage_is_planned_and_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a file of data, at a topology that is not here; the figures are said and written."""
    data = DataConfig(train="absent.jsonl", eval="absent.jsonl", max_length=32)
    config = replace(
        CONFIG,
        topology="v5e-8",
        out=str(tmp_path / "plan.json"),
        sft=replace(CONFIG.sft, data=data, pack_length=64, sampling=SamplingConfig(max_new_tokens=8)),
        reward=replace(CONFIG.reward, data=data, pack_length=64),
        ppo=replace(CONFIG.ppo, prompts=replace(data, max_length=16), ptx=data, ptx_coef=0.1),
    )
    monkeypatch.setattr(plan_run, "fitting_rows", lambda *_: 1)  # each program once
    found = planned(config)
    assert list(found) == ["sft", "reward", "ppo"]
    names = {name: [program.name for program in stage.programs] for name, stage in found.items()}
    assert names == {
        "sft": ["start", "update", "evaluation", "answers"],
        "reward": ["start", "update", "evaluation"],
        "ppo": ["start", "rollout", "readings", "scores", "update"],
    }
    for stage in found.values():
        assert stage.fits
        assert stage.peak == max(program.alive + program.temporaries for program in stage.programs)
        assert stage.seconds is not None
        assert stage.seconds > 0
        assert stage.flops > 0
        assert stage.sent["fsdp"] > 0
        assert stage.memory == 15.75 * 2**30
        assert stage.estimate is None, "nobody but the devices' own compiler gives one"
    # Two arrays a layer [rows, heads, slots, head size] of float32, two rows a device.
    assert found["ppo"].cache == 2 * 5 * (2 * 4 * 24 * 8) * 4
    assert found["sft"].cache == 2 * 5 * (1 * 4 * 40 * 8) * 4
    assert found["reward"].cache == 0
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["peak"] for stage in written["stages"]] == [stage.peak for stage in found.values()]
    out = capsys.readouterr().out
    assert all(
        word in out
        for word in ("v5e-8: 8 devices", "fitting batch", "ppo rollout", "sent: fsdp", "roofline", "simulated devices")
    )


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_cache_in_int8_is_planned_with_its_scales(dtype: Literal["float32", "bfloat16"], size: int) -> None:
    """Two arrays a layer [rows, heads, slots, head size], two rows a device; and what a rollout must read of them."""

    def rollout(kv_cache: CacheKind) -> tuple[float, float]:
        sampling = replace(CONFIG.ppo.sampling, kv_cache=kv_cache)
        config = replace(
            CONFIG, ppo=replace(CONFIG.ppo, model=ModelConfig("asset:stories260k", dtype=dtype), sampling=sampling)
        )
        site = planned_target(config)
        sized = plan_ppo(config, site)
        program = next(p for p in sized.build(sized.rows).programs if p.name == "rollout")
        return program_figures(program, site.topology, site.mesh, dtype).cache, program.read

    vectors, seen = 2 * 5 * 2 * 4 * 24, 2 * 5 * 2 * 4 * sum(range(17, 24))
    (plain, read), (small, less) = rollout("compute"), rollout("int8")
    assert (plain, small) == (vectors * 8 * size, vectors * (8 + 4))
    assert read - less == seen * (8 * size - (8 + 4))


def test_weights_with_as_many_columns_as_slots_are_no_scales() -> None:
    carry = "s32[], s8[2,4,24,8]{3,2,1,0}, f32[2,4,24]{2,1,0}, f32[5,64,24]{2,1,0}, bf16[2,4,24]{2,1,0}, f32[2,24]{1,0}"
    assert cache_bytes(f"  %w = ({carry}) while(%t), condition=%c, body=%b", (24, 8)) == 2 * 4 * 24 * (8 + 4)


def update_of(config: PlanConfig) -> tuple[Sized, Target]:
    site = planned_target(config)
    return plan_sft(config, site), site


def update_figures(sized: Sized, site: Target, rows: int) -> Figures:
    return program_figures(sized.build(rows).programs[1], site.topology, site.mesh, "float32")


def on(devices: int, **sft) -> PlanConfig:
    return replace(CONFIG, topology=f"cpu:{devices}", mesh=MeshConfig(fsdp=devices), sft=replace(CONFIG.sft, **sft))


def test_memory_falls_as_devices_grow() -> None:
    """The same batch of the same model, state and rows split over more devices."""
    peaks = [update_figures(*update_of(on(n, microbatch=16 // n)), 16 // n).peak for n in (1, 4, 8)]
    assert all(fewer > 1.5 * more for fewer, more in pairwise(peaks)), peaks


def test_rows_stay_with_their_device_where_weights_are_split() -> None:
    """With fsdp a device computes its own rows: what it holds grows with them, not with the rows of all."""
    temporaries = []
    for devices in (2, 8):
        sized, site = update_of(on(devices, batch_size=8 * devices, microbatch=8))
        program = sized.build(8).programs[1]
        memory = compile_program(program, site.topology).memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
        # The compiler's own count of what is given agrees, but for the key, which is not used.
        given = device_bytes(program.args)
        assert given - 64 <= memory.argument_size_in_bytes <= given
    assert temporaries[1] < 1.2 * temporaries[0]


def test_a_batch_that_does_not_fit_and_the_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sized, site = update_of(replace(CONFIG, sft=replace(CONFIG.sft, microbatch=2)))
    peaks = [update_figures(sized, site, rows).peak for rows in (12, 13)]
    # 12 rows a device fit, 13 do not.
    monkeypatch.setattr(Topology, "usable_memory", lambda self: sum(peaks) / 2)
    fine = plan_stage(sized, site)
    assert (fine.batch, fine.fits, fine.fitting_batch) == (16, True, 12 * 8)
    big, site = update_of(replace(CONFIG, sft=replace(CONFIG.sft, batch_size=320, microbatch=40)))
    refused = plan_stage(big, site)
    assert (refused.batch, refused.fits, refused.fitting_batch) == (320, False, 12 * 8)
    assert fitting_rows(sized, site, refused.programs, usable=sum(refused.held.values())) == 0


@pytest.mark.parametrize(("attention", "needs"), [("cudnn", "a GPU and bfloat16"), ("splash", "a TPU, v4 or newer")])
def test_attention_of_an_accelerator_is_planned_with_xlas_where_there_is_none(attention: str, needs: str) -> None:
    model = ModelConfig(path="asset:stories260k", attention=attention)  # pyright: ignore[reportArgumentType]
    site = planned_target(CONFIG)
    assert planned_model(site, MODEL, model, key="sft.model", kind=None).arch.num_layers == 5
    here = site._replace(topology=parse_topology(""))
    with pytest.raises(ConfigError, match=rf"sft\.model\.attention: {attention} needs {needs}, not cpu"):
        planned_model(here, MODEL, model, key="sft.model", kind=None)


def test_a_plan_without_stages_or_with_a_wrong_topology_says_so() -> None:
    with pytest.raises(ConfigError, match="nothing to plan"):
        run_plan(replace(CONFIG, sft=replace(CONFIG.sft, data=DataConfig())))
    with pytest.raises(ConfigError, match=r"topology: 'x9-8' is not known; known are"):
        run_plan(replace(CONFIG, topology="x9-8"))
    with pytest.raises(ValueError, match="does not use exactly 6 devices"):
        run_plan(replace(CONFIG, topology="cpu:6"))


def test_a_model_without_weights_is_enough(tmp_path: Path) -> None:
    """A folder with config.json alone, of a bfloat16 model that could not be loaded here."""
    source = json.loads((Path(assets.resolve("asset:stories260k")) / "config.json").read_text())
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(source | big | {"num_attention_heads": 64, "head_dim": 128}))
    config = replace(CONFIG, sft=replace(CONFIG.sft, model=ModelConfig(path=str(tmp_path), dtype="bfloat16")))
    site = planned_target(config)
    held = plan_sft(config, site).build(1).held
    total = sum(x.size for x in jax.tree.leaves(held["trained"]))
    assert total > 50e9
    # A quarter each with fsdp 4; norms are whole.
    assert total <= device_bytes(held["trained"]) < 1.001 * total
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(held["trained"]))
