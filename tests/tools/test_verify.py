"""`jrlhf verify` holds on a sound model, and says so when one is not."""

import dataclasses

import pytest

from jrlhf.config.tools import VerifyConfig
from jrlhf.tools import verify
from jrlhf.types import DecodeFns

ARGS = VerifyConfig(model="asset:stories260k", max_new_tokens=6, batch_size=4)


def test_a_sound_model_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run_verify(ARGS)
    printed = capsys.readouterr().out
    assert "broken" not in printed
    assert "8 devices or 1" in printed


def test_a_cache_that_forgets_the_order_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = verify.load_pretrained

    def load_broken(*args, **kwargs):
        model = load(*args, **kwargs)
        fns = model.decode_fns

        def decode(params, tokens, positions, cache):
            return fns.decode(params, tokens, positions // 2, cache)

        return dataclasses.replace(model, decode_fns=DecodeFns(fns.init_cache, decode))

    monkeypatch.setattr(verify, "load_pretrained", load_broken)
    assert not verify.run_verify(ARGS)
    assert "broken" in capsys.readouterr().out


def test_a_temperature_that_is_a_thousandth_off_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bound on the first log ratio grows with the log-probs; it must still tell rounding from an error."""
    make = verify._make_step

    def make_other(*models, temperature, accumulation):
        return make(*models, temperature=1.001 * temperature, accumulation=accumulation)

    monkeypatch.setattr(verify, "_make_step", make_other)
    assert not verify.run_verify(ARGS)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "broken" in line]
    assert "first minibatch: max |log ratio|" in line
