"""What a decoder is made of: one frozen dataclass of sizes and switches, whatever the family."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
NormKind = Literal["rms", "rms_plus_one", "layer"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions in the half-split form. What follows ``theta`` belongs to the scaled kinds."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0
    """Positions before scaling; "dynamic" leaves sequences up to it as they are."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: the bounds between kept and stretched pairs are whole numbers."""
    attention_factor: float = 1.0
    """yarn: what cosine and sine are multiplied by."""


class AttentionKind(NamedTuple):
    """What the queries of a layer see."""

    window: int
    """The last so many tokens, itself included; 0: all."""
    rope: Rope | None


@dataclass(frozen=True)
class ArchConfig:
    """Sizes and switches of a decoder. Sizes have no defaults; the switches' are those of Llama 2."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Positions the weights were trained for; learned ones end there."""
    norm_eps: float = 1e-5
    rope: Rope | None = Rope("default", 10_000.0)
    """None: positions are learned, one vector each."""
    activation: Activation = "silu"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    """The LM head is the transposed embedding; there is no lm_head leaf."""
    family: Family = "llama"
    """Decides the names in a checkpoint, and nothing else."""
    norm: NormKind = "rms"
    """"rms_plus_one" multiplies by 1 + scale; "layer" centres too, and has a bias."""
    gated_mlp: bool = True
    qk_norm: bool = False
    """Queries and keys are normalised head by head before they are rotated."""
    post_norms: bool = False
    """What attention and MLP give is normalised once more before it is added."""
    parallel_residual: bool = False
    """Attention and MLP read the same input: x + attention(norm(x)) + mlp(norm'(x))."""
    rotary_dim: int | None = None
    """Leading dimensions of a head that are rotated; None: all."""
    query_scalar: float | None = None
    """Queries are divided by its root; None: head_dim."""
    attention_softcap: float | None = None
    """c · tanh(x / c) on attention scores."""
    final_softcap: float | None = None
    """The same on logits."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by √hidden_size."""
    window: int = 0
    """What a query of a local layer sees: so many tokens, itself included."""
    local_layers: tuple[bool, ...] = ()
    """Which layers are local; (): none."""
    local_rope: Rope | None = None
    """The local layers' own rotary positions; None: ``rope``."""

    @property
    def packable(self) -> bool:
        """Whether several sequences may share a row; "dynamic" rotary positions depend on the length of each."""
        return self.rope is None or self.rope.kind != "dynamic"

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """For each layer its place in ``attention_kinds``."""
        if not any(self.local_layers) or all(self.local_layers):
            return (0,) * self.num_layers
        return tuple(int(local) for local in self.local_layers)

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention that occur: one, or the global and the local."""
        everywhere = AttentionKind(0, self.rope)
        local = AttentionKind(self.window, self.local_rope or self.rope)
        if not any(self.local_layers):
            return (everywhere,)
        return (local,) if all(self.local_layers) else (everywhere, local)
