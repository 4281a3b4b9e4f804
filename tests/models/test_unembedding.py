"""Log-probs from hidden states: against a plain loop, on any mesh, sorted and sliced in every way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jrlhf.models import token_slices, unembedding
from jrlhf.models.unembedding import LMHead, hidden_logprobs
from jrlhf.parallel import batch_sharding, make_mesh
from jrlhf.parallel.sharding import leaf_spec
from tests.support import oracles

VOCABULARY, WIDTH, LENGTH = 12, 8, 6
MESHES = {"one device": None, "data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2), "tensor": (1, 2, 4)}


def mesh_of(name):
    sizes = MESHES[name]
    return None if sizes is None else make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))


def head_of(mesh, *, tied, logits_at_once, softcap=None):
    axes = ("tensor", "fsdp") if tied else ("fsdp", "tensor")
    shape = (VOCABULARY, WIDTH) if tied else (WIDTH, VOCABULARY)
    spec = PartitionSpec() if mesh is None else leaf_spec("x", shape, mesh, (("x", PartitionSpec(*axes)),))
    return LMHead(tied, softcap, logits_at_once, mesh, spec, 0.7)


def arrays(rows, tied, mesh):
    keys = jax.random.split(jax.random.key(0), 4)
    kernel = jax.random.normal(keys[0], (VOCABULARY, WIDTH) if tied else (WIDTH, VOCABULARY))
    hidden = jax.random.normal(keys[1], (rows, LENGTH, WIDTH))
    tokens = jax.random.randint(keys[2], (rows, LENGTH), 0, VOCABULARY)
    where = jax.random.bernoulli(keys[3], 0.5, (rows, LENGTH))
    if mesh is not None and rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
        hidden, tokens, where = (jax.device_put(x, batch_sharding(mesh)) for x in (hidden, tokens, where))
    return kernel, hidden, tokens, where


def plain(kernel, hidden, tokens, where, *, tied, softcap):
    """Log-probs and entropy in float64 loops; 0 where nothing is requested."""
    kernel, hidden = np.asarray(kernel, np.float64), np.asarray(hidden, np.float64)
    logits = hidden @ (kernel.T if tied else kernel)
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    outputs = oracles.token_logprobs(logits, np.asarray(tokens), 0.7)
    return [x if where is None else np.where(np.asarray(where), x, 0.0) for x in outputs]


@pytest.fixture(autouse=True)
def many_slices(monkeypatch):
    monkeypatch.setattr(token_slices, "MIN_SLICE_TOKENS", 1)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("rows", [8, 3])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("at_once", [2, 1000], ids=["sliced", "at once"])
def test_logprobs_and_entropy_are_those_of_a_plain_loop(mesh, rows, masked, at_once):
    mesh, tied = mesh_of(mesh), masked
    kernel, hidden, tokens, where = arrays(rows, tied, mesh)
    where = where.at[:, 0].set(False) if masked else None
    head = head_of(mesh, tied=tied, logits_at_once=at_once * VOCABULARY, softcap=3.0)
    found = jax.jit(lambda *args: hidden_logprobs(head, *args, where=where))(kernel, hidden, tokens)
    expected = plain(kernel, hidden, tokens, where, tied=tied, softcap=3.0)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("at_once", [2, 1000], ids=["sliced", "at once"])
def test_gradients_are_those_of_all_logits_at_once(mesh, masked, at_once):
    mesh, tied = mesh_of(mesh), not masked
    kernel, hidden, tokens, where = arrays(8, tied, mesh)
    weights = jax.random.normal(jax.random.key(9), tokens.shape)
    where = where.at[:, 0].set(False) if masked else None
    head = head_of(mesh, tied=tied, logits_at_once=at_once * VOCABULARY)
    counted = jnp.ones(tokens.shape, jnp.bool_).at[:, 0].set(False) if where is None else where

    def loss(kernel, hidden):
        logprobs, entropy = hidden_logprobs(head, kernel, hidden, tokens, where=where)
        return jnp.sum(weights * (logprobs + 0.3 * entropy))

    def plain_loss(kernel, hidden):
        scaled = jnp.einsum("BTD,DV->BTV", hidden, kernel.T if tied else kernel) / 0.7
        logp = jax.nn.log_softmax(scaled)[:, :-1]
        chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return jnp.sum(jnp.where(counted, weights, 0.0)[:, 1:] * (chosen + 0.3 * entropy))

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(kernel, hidden)
    expected = jax.grad(plain_loss, argnums=(0, 1))(kernel, hidden)
    for a, b in zip(found, expected, strict=True):
        assert float(jnp.max(jnp.abs(b))) > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("requested", "slices"), [(12, 6), (11, 6), (4, 2), (3, 2), (1, 1), (0, 0)])
def test_slices_without_a_requested_token_are_skipped(requested, slices):
    """Slices of two tokens; the requested ones of all rows come first."""
    calls = []
    head = head_of(None, tied=False, logits_at_once=2 * VOCABULARY)
    kernel, hidden, tokens, _ = arrays(3, False, None)
    where = (jnp.arange(12) < requested)[jnp.asarray(np.random.default_rng(0).permutation(12))].reshape(3, 4)
    where = jnp.pad(where, ((0, 0), (1, 1)))

    def figures(*args):
        jax.debug.callback(lambda: calls.append(1))
        return real(*args)

    real = unembedding._figures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unembedding, "_figures", figures)
        patch.setattr(token_slices, "MAX_SLICES", 1)
        jax.block_until_ready(hidden_logprobs(head, kernel, hidden, tokens, where=where))
    jax.effects_barrier()
    assert len(calls) == slices


def hlo(mesh, *, at_once, frozen=False):
    tied = True
    head = head_of(mesh, tied=tied, logits_at_once=at_once * VOCABULARY)
    kernel, hidden, tokens, _ = arrays(8, tied, mesh)
    kernel = jax.device_put(kernel, NamedSharding(mesh, head.spec))

    def loss(kernel, hidden):
        return jnp.sum(hidden_logprobs(head, kernel, hidden, tokens, where=None)[0])

    gradient = jax.jit(jax.grad(loss, argnums=1 if frozen else (0, 1)))
    return gradient.lower(kernel, hidden).compile().as_text()


def test_the_head_is_gathered_and_its_gradient_sent_outside_of_all_loops():
    """As many collectives for many slices as for one."""
    mesh = mesh_of("all")
    sliced, whole = (hlo(mesh, at_once=size) for size in (1, 1000))
    assert "while(" in sliced
    for kind in ("all-gather(", "all-gather-start(", "reduce-scatter(", "all-reduce("):
        assert sliced.count(kind) <= whole.count(kind), kind


def test_a_frozen_head_has_no_gradient():
    """One product a slice less, and nothing to sum over devices."""
    trained, frozen = (hlo(mesh_of("all"), at_once=2, frozen=frozen) for frozen in (False, True))
    assert trained.count(" dot(") - frozen.count(" dot(") == 1
    assert "reduce-scatter(" in trained or "all-reduce(" in trained
    assert "reduce-scatter(" not in frozen
    assert "all-reduce(" not in frozen
