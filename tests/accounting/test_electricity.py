"""Kilowatt-hours and kilograms of CO2 follow from a time and from assumptions that are told."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auxin.accounting import Electricity, electricity
from auxin.errors import ConfigError

POUND = 453.59237
"""Grams."""


def test_bert_base_is_what_strubell_and_others_print():
    """Their table 3: BERT-base, 64 V100 that draw 12,041.51 W for 79.2 hours: 1,507 kWh, 1,438 pounds, by a PUE of 1.58
    and 0.954 pounds for a kWh."""
    seconds, told = 79.2 * 3600, Electricity(watts=12041.51, pue=1.58, grams_per_kwh=0.954 * POUND)
    assert round(told.kilowatt_hours(seconds)) == 1507
    assert told.kilograms(seconds) * 1000 / POUND == pytest.approx(1438, abs=1)


@given(
    seconds=st.floats(0, 1e8),
    watts=st.floats(1, 1e6),
    pue=st.floats(1, 3),
    grams=st.floats(0, 1000),
    times=st.floats(1, 9),
)
def test_it_is_a_product(seconds, watts, pue, grams, times):
    one = Electricity(watts=watts, pue=pue, grams_per_kwh=grams)
    assert one.kilograms(times * seconds) == pytest.approx(times * one.kilograms(seconds))
    more = Electricity(watts=times * watts, pue=pue, grams_per_kwh=grams)
    assert more.kilograms(seconds) == pytest.approx(times * one.kilograms(seconds))
    assert one.kilograms(seconds) == pytest.approx(seconds / 3.6e6 * watts * pue * grams / 1000)


def test_a_line_has_the_whole_arithmetic():
    told = Electricity(watts=12041.51, pue=1.58, grams_per_kwh=433).arithmetic(79.2 * 3600)
    assert told == "79.2 h x 12,041.5 W x 1.58 (PUE) = 1,507 kWh; x 433 g/kWh = 652 kg CO2e"
    assert Electricity(watts=12, grams_per_kwh=0).arithmetic(1.0).endswith("= 0 kg CO2e")


def test_what_is_not_known_is_not_told(monkeypatch):
    assert Electricity(watts=9).kilograms(None) is None
    assert "time is not" in Electricity(watts=9).arithmetic(None)
    monkeypatch.setattr(electricity, "choose_device", lambda name: torch.device("cuda"))
    of_a_gpu = Electricity().drawn()
    assert of_a_gpu.kilograms(60.0) is None
    assert "Give electricity.watts" in of_a_gpu.arithmetic(60.0)
    assert Electricity(watts=300).drawn().watts == 300


def test_a_processor_draws_for_every_thread(monkeypatch):
    monkeypatch.setattr(electricity, "choose_device", lambda name: torch.device("cpu"))
    assert Electricity().drawn(threads=3).watts == 36
    assert Electricity().drawn().watts == 12 * torch.get_num_threads()
    assert Electricity(watts=65).drawn(threads=3).watts == 65


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pue": 0.9}, "pue: must be 1 or more"),
        ({"watts": 0}, "watts: must be more than 0"),
        ({"grams_per_kwh": -1}, "grams_per_kwh: must be 0 or more"),
        ({"watts": float("inf")}, "watts: must be a finite number"),
        ({"watt": 9}, "Did you mean 'watts'"),
    ],
)
def test_what_can_t_be_is_one_message(values, words):
    with pytest.raises(ConfigError, match=words):
        Electricity.parse(values)
