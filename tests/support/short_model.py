"""The shipped model with two of its five layers: programs of whole runs compile in less time, and show the same."""

import json
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from jrlhf import assets
from tests.support.once import once

LAYERS = 2


def short_model(folder: Path) -> str:
    """Write the model to a folder and return its path."""
    source = Path(assets.resolve("asset:stories260k"))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    left_out = tuple(f"model.layers.{layer}." for layer in range(LAYERS, config["num_hidden_layers"]))
    config["num_hidden_layers"] = LAYERS
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(source / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(left_out)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


SHORT_MODEL: str = once("short-model", short_model)
