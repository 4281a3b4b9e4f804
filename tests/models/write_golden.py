"""Write golden.npz anew, with torch: ``cd tests && python -m models.write_golden``."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from tests.support.checkpoints import VARIANTS, padded_batches, write_named


def logits(variant: str) -> np.ndarray:
    tokens, _ = padded_batches()["none"]
    with TemporaryDirectory() as folder, torch.no_grad():
        source = write_named(Path(folder), variant)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), (variant, info)
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits[0].numpy()


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden.npz", **{variant: logits(variant) for variant in VARIANTS})
