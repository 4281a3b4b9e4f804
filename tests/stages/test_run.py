"""What a run's folder holds, and what may change before it is gone on with."""

from dataclasses import replace

import pytest

from jrlhf.config import Config
from jrlhf.config_io import ConfigError, apply_flags
from jrlhf.stages.run import open_stage


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_goes_on_with_its_rows_in_another_cache_but_not_from_other_data(stage, tmp_path):
    config = replace(Config(), run=str(tmp_path))
    data = {"sft": ["sft.data"], "reward": ["reward.data"], "ppo": ["ppo.prompts", "ppo.ptx"]}[stage]
    with open_stage(config, stage) as folder:
        (folder / "checkpoints" / "1").mkdir(parents=True)
    for name in data:
        with open_stage(apply_flags(config, {f"{name}.cache": ["elsewhere"]}), stage):
            pass
        with (
            pytest.raises(ConfigError, match=rf"{name}\.train: '' -> {{'a': 2\.0}}"),
            open_stage(apply_flags(config, {f"{name}.train": ["{a: 2}"]}), stage),
        ):
            pass
