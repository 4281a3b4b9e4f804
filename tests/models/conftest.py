"""Tiny random checkpoints, written by transformers itself where torch is there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models import ArchConfig
from tests.support.archs import small_arch
from tests.support.checkpoints import CONFIGS, padded_batches


@pytest.fixture(scope="session")
def arch() -> ArchConfig:
    """Grouped queries and odd sizes, for tests that need no checkpoint."""
    return small_arch(num_layers=3)


@pytest.fixture(scope="session")
def spread() -> Callable[[Any], Any]:
    """Untrained parameters with five times the usual spread (not norms and biases), to make differences show."""
    return lambda params: jax.tree.map(lambda x: x * 5.0 if float(jnp.std(x)) > 0.0 else x, params)


@pytest.fixture(scope="session")
def write_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """``(variant, reward=False, dtype="float32", **save) -> (folder, torch model)``, biases and norms random too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def write(variant: str, *, reward: bool = False, dtype: str = "float32", **save: Any) -> tuple[Path, Any]:
        config = transformers.AutoConfig.for_model(**CONFIGS[variant])
        kind = transformers.AutoModelForCausalLM
        if reward:
            config.num_labels = 1
            kind = transformers.AutoModelForSequenceClassification
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    ones = "bias" not in name and "gemma" not in CONFIGS[variant]["model_type"]
                    parameter.copy_(torch.randn_like(parameter) * 0.3 + ones)
        model = model.to(getattr(torch, dtype))
        folder = tmp_path_factory.mktemp(variant)
        model.save_pretrained(folder, **save)
        return folder, model

    return write


@pytest.fixture
def padded() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """See ``padded_batches``."""
    return padded_batches()


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """transformers' logits on ``padded["none"]`` for the checkpoints of ``write_named``, by variant."""
    with np.load(Path(__file__).parent / "golden.npz") as file:
        return dict(file)
