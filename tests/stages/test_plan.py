"""Plans: a state to the byte, memory that falls as devices grow, a batch that fits and one that does not."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jrlhf import assets
from jrlhf.config import (
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
)
from jrlhf.config_io import ConfigError
from jrlhf.models import load_pretrained, reward_from_pretrained
from jrlhf.stages.adapters import trainable
from jrlhf.stages.optim import make_actor_critic_optimizer, make_optimizer
from jrlhf.stages.plan import run_plan
from jrlhf.stages.plan.parts import Site
from jrlhf.stages.plan.ppo import ppo_stage
from jrlhf.stages.plan.programs import compiled, device_bytes, measured
from jrlhf.stages.plan.reward import reward_stage
from jrlhf.stages.plan.run import StageFigures, fitting_rows, plan_stage, planned_site
from jrlhf.stages.plan.sft import sft_stage
from jrlhf.stages.start import start_training
from jrlhf.types import PPOParams

CONFIG = PlanConfig(
    topology="cpu:8",
    mesh=MeshConfig(fsdp=4),
    sft=SFTConfig(
        model=ModelConfig(path="asset:stories260k"), data=DataConfig(train="absent.jsonl", max_length=32), batch_size=16
    ),
    reward=RewardConfig(data=DataConfig(max_length=32)),
    ppo=PPOConfig(
        prompts=DataConfig(max_length=16), sampling=SamplingConfig(max_new_tokens=8), episodes=16, microbatch=1
    ),
)
LORA = LoRAConfig(rank=4, targets="q_proj")


def spread(tree) -> int:
    """Bytes of real arrays on the first device."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
    first = jax.devices()[0]
    return sum(s.data.nbytes for leaf in leaves.values() for s in leaf.addressable_shards if s.device == first)


def never(state, batch, key):
    raise AssertionError("nothing is run")


@pytest.mark.parametrize(("kind", "lora"), [("sft", LoRAConfig()), ("reward", LORA), ("ppo", LoRAConfig())])
def test_a_planned_state_has_the_bytes_of_a_real_one(kind: str, lora: LoRAConfig) -> None:
    sft, reward, ppo = (replace(part, lora=lora) for part in (CONFIG.sft, CONFIG.reward, CONFIG.ppo))
    config = replace(CONFIG, sft=sft, reward=reward, ppo=replace(ppo, ema_decay=0.9))
    site = planned_site(config)
    make = {"sft": sft_stage, "reward": reward_stage, "ppo": ppo_stage}[kind]
    held = make(config, site).build(1).held

    base = load_pretrained(assets.resolve("asset:stories260k"), dtype="float32", mesh=site.mesh)
    critic = reward_from_pretrained(base, jax.random.key(0))
    tx, _ = make_optimizer(config.sft.optim, updates=9)
    more = {}
    match kind:
        case "sft":
            trained, frozen = trainable(base, lora, jax.random.key(0), mesh=site.mesh, path="lora")
            loaded = base.params
        case "reward":
            trained, frozen = trainable(critic, lora, jax.random.key(0), mesh=site.mesh, path="lora")
            loaded = base.params, critic.params
        case _:
            # The reward model of a run has weights of its own.
            own = load_pretrained(assets.resolve("asset:stories260k"), dtype="float32", mesh=site.mesh)
            critic = reward_from_pretrained(own, jax.random.key(0))
            halves = [trainable(m, lora, jax.random.key(0), mesh=site.mesh, path="lora") for m in (base, critic)]
            trained = PPOParams(halves[0][0], halves[1][0])
            frozen = PPOParams(halves[0][1], halves[1][1]) if lora.rank else None
            loaded = base.params, critic.params
            tx, _ = make_actor_critic_optimizer(config.ppo.optim, value_lr=0.0, updates=9)
            more = {"ema": trained.policy}
    state, _ = start_training(never, tx, trained, mesh=site.mesh, rules=base.rules, seed=0, frozen=frozen, **more)

    real = {"trained": state.train.params, "optimizer": state.train.opt_state, "average": state.train.ema}
    assert {name: device_bytes(held[name]) for name in real} == {name: spread(tree) for name, tree in real.items()}
    # The head of a fresh reward model is on one device until training begins: it is the first.
    assert device_bytes(held["loaded"]) == spread((loaded, frozen))
    assert (device_bytes(held["trained"]) < device_bytes(held["loaded"]) / 2) == bool(lora.rank)


def planned(config: PlanConfig) -> dict[str, StageFigures]:
    return {stage.name: stage for stage in run_plan(config)}


def test_what_programs_are_given_is_what_they_are_said_to_be_given() -> None:
    """The compiler's own count of arguments agrees: nothing alive is forgotten."""
    site = planned_site(CONFIG)
    stage = sft_stage(CONFIG, site).build(1)
    for program in stage.programs:
        memory = compiled(program, site.topology).memory_analysis()
        given = device_bytes(program.args)
        # The key is not used, and counters are scalars.
        assert given - 64 <= memory.argument_size_in_bytes <= given


def test_every_stage_is_planned_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    found = planned(config)
    assert list(found) == ["sft", "reward", "ppo"]
    names = {name: [program.name for program in stage.programs] for name, stage in found.items()}
    assert names == {
        "sft": ["start", "update", "evaluation", "answers"],
        "reward": ["start", "update", "evaluation"],
        "ppo": ["start", "rollout", "scores", "experience", "update"],
    }
    for stage in found.values():
        assert stage.fits
        assert stage.peak == max(program.alive + program.temporaries for program in stage.programs)
        assert stage.seconds is not None
        assert stage.seconds > 0
        assert stage.flops > 0
        assert stage.sent["fsdp"] > 0
        assert stage.memory == 0.9 * 16e9
    # Two arrays a layer [rows, heads, slots, head size] of float32, two rows a device.
    assert found["ppo"].cache == 2 * 5 * (2 * 4 * 24 * 8) * 4
    assert found["sft"].cache == 2 * 5 * (1 * 4 * 40 * 8) * 4
    assert found["reward"].cache == 0
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["peak"] for stage in written["stages"]] == [stage.peak for stage in found.values()]
    out = capsys.readouterr().out
    assert all(word in out for word in ("v5e-8: 8 devices", "fitting batch", "ppo rollout", "sent: fsdp", "Seconds:"))


def test_memory_falls_as_devices_grow() -> None:
    """The same batch of the same model, state and rows split over 1, 2, 4, 8 devices."""
    peaks = []
    for devices in (1, 2, 4, 8):
        config = replace(CONFIG, topology=f"cpu:{devices}", mesh=MeshConfig(fsdp=devices))
        site = planned_site(replace(config, sft=replace(config.sft, microbatch=16 // devices)))
        sized = sft_stage(replace(config, sft=replace(config.sft, microbatch=16 // devices)), site)
        figures = [measured(p, site.topology, site.mesh, "float32") for p in sized.build(sized.rows).programs]
        peaks.append(max(f.peak for f in figures))
    assert all(more > 1.4 * fewer for more, fewer in pairwise(peaks)), peaks


def test_rows_stay_with_their_device_where_weights_are_split() -> None:
    """With fsdp a device computes its own rows: what it holds grows with them, not with the rows of all."""
    temporaries = []
    for devices in (2, 8):
        config = replace(CONFIG, topology=f"cpu:{devices}", mesh=MeshConfig(fsdp=devices))
        config = replace(config, sft=replace(config.sft, batch_size=8 * devices, microbatch=8))
        site = planned_site(config)
        stage = sft_stage(config, site).build(8)
        temporaries.append(measured(stage.programs[1], site.topology, site.mesh, "float32").temporaries)
    assert temporaries[1] < 1.2 * temporaries[0]


def test_a_batch_that_does_not_fit_and_the_one_that_does() -> None:
    config = replace(CONFIG, sft=replace(CONFIG.sft, microbatch=2))
    site = planned_site(config)
    sized = sft_stage(config, site)

    def peak(rows: int) -> float:
        return max(measured(p, site.topology, site.mesh, "float32").peak for p in sized.build(rows).programs)

    usable = (peak(12) + peak(13)) / 2
    programs = [measured(p, site.topology, site.mesh, "float32") for p in sized.build(2).programs]
    assert fitting_rows(sized, site, programs, usable) == 12
    # Asked for 40 rows a device at a time, it says so, and what would do.
    big = replace(config, sft=replace(config.sft, batch_size=320, microbatch=40))
    site = Site(site.topology, site.mesh)
    sized = sft_stage(big, site)
    programs = [measured(p, site.topology, site.mesh, "float32") for p in sized.build(40).programs]
    assert max(p.peak for p in programs) > usable
    assert fitting_rows(sized, site, programs, usable) in (11, 12, 13)


def test_a_stage_says_whether_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    site = planned_site(CONFIG)
    memory: dict[str, float] = {"bytes": 1e9}
    monkeypatch.setattr(type(site.topology), "memory", lambda self: memory["bytes"])
    sized = sft_stage(CONFIG, site)
    roomy = plan_stage(sized, site)
    assert roomy.fits
    assert roomy.fitting_batch is not None
    assert roomy.fitting_batch > roomy.batch
    memory["bytes"] = roomy.peak / 0.9 * 0.8
    tight = plan_stage(sized, site)
    assert tight.fits is False
    assert tight.fitting_batch is not None
    assert tight.fitting_batch < tight.batch
    memory["bytes"] = sum(roomy.held.values())
    assert plan_stage(sized, site).fitting_batch == 0


def test_a_plan_without_stages_or_with_a_wrong_topology_says_so() -> None:
    with pytest.raises(ConfigError, match="nothing to plan"):
        run_plan(replace(CONFIG, sft=replace(CONFIG.sft, data=DataConfig())))
    with pytest.raises(ConfigError, match=r"topology: 'x9-8' is not known; there are"):
        run_plan(replace(CONFIG, topology="x9-8"))
    with pytest.raises(ValueError, match="does not use exactly 6 devices"):
        run_plan(replace(CONFIG, topology="cpu:6"))


def test_a_model_without_weights_is_enough(tmp_path: Path) -> None:
    """A folder with config.json alone, of a bfloat16 model that could not be loaded here."""
    source = json.loads((Path(assets.resolve("asset:stories260k")) / "config.json").read_text())
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(source | big | {"num_attention_heads": 64, "head_dim": 128}))
    config = replace(CONFIG, sft=replace(CONFIG.sft, model=ModelConfig(path=str(tmp_path), dtype="bfloat16")))
    site = planned_site(config)
    held = sft_stage(config, site).build(1).held
    total = sum(x.size for x in jax.tree.leaves(held["trained"]))
    assert total > 50e9
    # A quarter each with fsdp 4; norms are whole.
    assert total <= device_bytes(held["trained"]) < 1.001 * total
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(held["trained"]))
