"""Sites and streams of dropout masks."""

from __future__ import annotations

import pytest

from mtbert.errors import ConfigError
from mtbert.kernels import Dropout
from mtbert.model.dropout import (
    EMBEDDING,
    FORWARD_PASS,
    DropoutRates,
    DropoutStream,
    Place,
    activation_site,
    head_site,
    layer_site,
)


def test_every_place_has_its_own_site():
    sites = [EMBEDDING]
    sites += [layer_site(layer, place) for layer in range(48) for place in Place]
    sites += [head_site(head, depth) for head in range(32) for depth in range(16)]
    sites += [activation_site(head, depth) for head in range(32) for depth in range(16)]
    assert len(set(sites)) == len(sites)
    assert min(sites) >= 0
    assert max(sites) < FORWARD_PASS


@pytest.mark.parametrize(
    "call",
    [
        lambda: layer_site(2**16, Place.OUTPUT),
        lambda: head_site(0, 64),
        lambda: layer_site(-1, Place.OUTPUT),
        lambda: activation_site(0, 32),
    ],
)
def test_places_without_a_site_are_refused(call):
    with pytest.raises(ValueError, match=r"has no (dropout )?site"):
        call()


def test_a_stream_names_seed_step_and_pass():
    site = layer_site(3, Place.ATTENTION)
    assert DropoutStream(seed=5, step=7).at(0.1, site) == Dropout(p=0.1, seed=5, step=7, site=site)
    third = DropoutStream(seed=5, step=7, forward_pass=3).at(0.1, site)
    assert third == Dropout(p=0.1, seed=5, step=7, site=site + 3 * 2**20)
    assert DropoutStream(seed=5, step=7).at(0.0, site) is None


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_impossible_rates_are_refused_by_name(p: float):
    with pytest.raises(ConfigError, match=r"dropout\.attention: .* found"):
        DropoutRates(attention=p)
