"""Training settings: the learning rate's course, the JSON form, and combinations that cannot be built."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer import AuxK, JumpReLU, TrainConfig, UserError, Wiring

WIRING = Wiring.full(3)


def config(**settings) -> TrainConfig:
    return TrainConfig(wiring=WIRING, **settings)


def test_the_learning_rate_rises_stays_and_falls():
    schedule = config(warmup_share=0.1, decay_share=0.4).schedule
    assert [schedule(p) for p in (0.0, 0.05, 0.1, 0.35, 0.6, 0.8, 1.0)] == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])


def test_without_warmup_and_decay_the_learning_rate_is_flat():
    schedule = config(warmup_share=0.0, decay_share=0.0).schedule
    assert {schedule(p) for p in (0.0, 0.3, 1.0)} == {1.0}


@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_learning_rate_stays_between_0_and_its_peak(progress, warmup, decay):
    assert 0 <= config(warmup_share=warmup, decay_share=decay).schedule(progress) <= 1


def test_the_peak_rate_falls_with_the_width_unless_one_is_given():
    assert [config().peak_rate(F) for F in (100, 750, 24_000)] == pytest.approx([0.016, 0.016, 5e-4])
    assert config(learning_rate=0.5).peak_rate(24_000) == 0.5


def test_the_width_is_given_or_a_multiple_of_d_model():
    assert config(d_transcoder=100, expansion=3).width(16) == 100
    assert config(expansion=3).width(16) == 48


def test_the_record_is_json_and_names_the_sparsity():
    record = config(sparsity=JumpReLU(0.25), auxk=AuxK(k=5)).record()
    again = json.loads(json.dumps(record))
    assert again["sparsity"]["kind"] == "jumprelu"
    assert again["sparsity"]["coefficient"] == 0.25
    assert again["wiring"] == {"n_layers": 3, "span": 3, "first_target": 0}
    assert again["auxk"]["k"] == 5


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokens": 0}, "tokens is 0; choose more than 0"),
        ({"batch_tokens": -1}, "batch_tokens is -1"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"expansion": 0}, "expansion is 0"),
        ({"density_tokens": 0}, "density_tokens is 0"),
        ({"calibration_tokens": 0}, "calibration_tokens is 0"),
        ({"d_transcoder": 0}, "d_transcoder is 0"),
        ({"warmup_share": 0.5, "decay_share": 0.6}, r"warmup_share 0\.5 and decay_share 0\.6"),
        ({"warmup_share": -0.1}, r"warmup_share -0\.1"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        config(**settings)
