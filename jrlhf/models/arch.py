"""The architecture of a decoder: one frozen dataclass of sizes and switches for all families."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
NormKind = Literal["rms", "rms_plus_one", "layer"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions in the half-split form. The fields after ``theta`` apply to the scaled kinds only."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0
    """Number of positions before scaling; "dynamic" does not scale sequences up to this length."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """For yarn: round the bounds between unscaled and scaled pairs to whole numbers."""
    attention_factor: float = 1.0
    """For yarn: factor of cosine and sine."""


class AttentionKind(NamedTuple):
    """Attention window and rotary positions of a kind of layers."""

    window: int
    """Number of last tokens that a query attends to, its own included; 0: all."""
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
    """Number of positions that the weights were trained for; learned positions end there."""
    norm_eps: float = 1e-5
    rope: Rope | None = Rope("default", 10_000.0)
    """Rotary positions; None: learned positions, one vector each."""
    activation: Activation = "silu"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    """Use the transposed embedding as LM head; there is no lm_head leaf then."""
    family: Family = "llama"
    """Model family; it decides only the names in a checkpoint."""
    norm: NormKind = "rms"
    """Kind of norm: "rms_plus_one" multiplies by 1 + scale; "layer" also centres and has a bias."""
    gated_mlp: bool = True
    qk_norm: bool = False
    """Normalise queries and keys per head before the rotation."""
    post_norms: bool = False
    """Normalise the outputs of attention and MLP before they are added to the residual."""
    parallel_residual: bool = False
    """Attention and MLP read the same input: x + attention(norm(x)) + mlp(norm'(x))."""
    rotary_dim: int | None = None
    """Number of leading dimensions of a head to rotate; None: all."""
    query_scalar: float | None = None
    """Queries are divided by the square root of this number; None: head_dim."""
    attention_softcap: float | None = None
    """Soft cap c of attention scores: c · tanh(x / c)."""
    final_softcap: float | None = None
    """Soft cap c of logits: c · tanh(x / c)."""
    scale_embeddings: bool = False
    """Multiply embeddings by √hidden_size."""
    window: int = 0
    """Number of tokens that a query of a local layer attends to, its own included."""
    local_layers: tuple[bool, ...] = ()
    """True for each local layer; (): no layer is local."""
    local_rope: Rope | None = None
    """Rotary positions of local layers; None: ``rope``."""

    @property
    def packable(self) -> bool:
        """Whether several sequences may share a row; "dynamic" rotary positions depend on a sequence's length."""
        return self.rope is None or self.rope.kind != "dynamic"

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """Index into ``attention_kinds`` for each layer."""
        if not any(self.local_layers) or all(self.local_layers):
            return (0,) * self.num_layers
        return tuple(int(local) for local in self.local_layers)

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Kinds of attention in the decoder: a single one, or global then local."""
        everywhere = AttentionKind(0, self.rope)
        local = AttentionKind(self.window, self.local_rope or self.rope)
        if not any(self.local_layers):
            return (everywhere,)
        return (local,) if all(self.local_layers) else (everywhere, local)
