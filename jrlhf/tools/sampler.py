"""The sampler of ``jrlhf generate`` and ``jrlhf sample``: a model, the prompts of a file, and how they are answered."""

from dataclasses import replace
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jrlhf import assets
from jrlhf.config import DataConfig
from jrlhf.config.tools import GenerateConfig
from jrlhf.data import Columns, PromptRows, Tokenizer, load_prompts, load_tokenizer
from jrlhf.models import Pretrained, load_pretrained
from jrlhf.parallel import make_mesh
from jrlhf.rollout.sampling import GenerateFn, jit_generate
from jrlhf.runs.folder import last_export
from jrlhf.train.keys import stream_key
from jrlhf.train.positions import Positions

NO_COLUMNS = Columns()

BATCHES_AT_ONCE = 4
"""Batches of answers that one call of the sampler draws, each answer in the slot of one that has ended."""


class Sampler(NamedTuple):
    """A model that answers prompts."""

    model: Pretrained
    tokenizer: Tokenizer
    prompts: PromptRows
    mesh: Mesh
    generate: GenerateFn
    settings: dict[str, Any]
    """Keywords of ``rollout.sampling.draws``."""


def load_sampler(args: GenerateConfig, columns: Columns = NO_COLUMNS) -> Sampler:
    """Load the model and the prompts, with the ``columns`` of their rows that rules read."""
    source = last_export(assets.resolve(args.model), "language")
    tokenizer = load_tokenizer(source)
    data = DataConfig(train=args.prompts, max_length=args.max_length)
    prompts = load_prompts(data, args.prompts, tokenizer, columns)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    model = load_pretrained(source, dtype=args.dtype, mesh=mesh, weights="auto", option="model")
    Positions(model.arch, "max_length").answering(args.sampling, "sampling").check({args.prompts: prompts})
    sampling = replace(args.sampling, slots=-(-args.batch_size // mesh.size))
    generate = jit_generate(model.decode_fns, sampling, tokenizer, mesh, option="sampling", samples=args.samples)
    settings = {
        "samples": args.samples,
        "key": stream_key(args.seed, "generate", "samples"),
        "mesh": mesh,
        "batch_size": BATCHES_AT_ONCE * args.batch_size,
        "show_progress": len(prompts) * args.samples > args.batch_size,
    }
    return Sampler(model, tokenizer, prompts, mesh, generate, settings)
