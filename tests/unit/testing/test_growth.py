"""`check_particle` finds what is wrong with a structure that changes: each rule is broken once."""

import dataclasses
import itertools
import math

import pytest
import torch

from distvsd.config import GaussiansConfig
from distvsd.particles import Adapted, GaussianParticle
from distvsd.testing import check_particle

SMALL = GaussiansConfig(capacity=20, init_color=1.0, relocate_every=2, noise=1.0)


class Broken(GaussianParticle):
    """Its growth is that of gaussians with `harm` done to it."""

    def adapt(self, parameters, keys, factors):
        found = super().adapt(parameters, keys, factors)
        return found and self.harm(found, parameters)

    def harm(self, found, parameters):
        return found


def replaced(found, **values):
    return dataclasses.replace(found, parameters=found.parameters | values)


class InPlace(Broken):
    def harm(self, found, parameters):
        parameters["means"] += 1
        return found


class Unkeyed(Broken):
    calls = itertools.count(1)

    def harm(self, found, parameters):
        return replaced(found, means=found.parameters["means"] + next(self.calls))


class Growing(Broken):
    def harm(self, found, parameters):
        return replaced(found, means=torch.cat((parameters["means"],) * 2, dim=1))


class Unknown(Broken):
    def harm(self, found, parameters):
        return replaced(found, extra=parameters["means"])


class Shared(Broken):
    def harm(self, found, parameters):
        return replaced(found, means=parameters["means"] + parameters["means"].nanmean(0))


class Contagious(Broken):
    def harm(self, found, parameters):
        lost = parameters["means"].isnan().any()
        return replaced(found, means=found.parameters["means"] + (math.nan if lost else 0.0))


class WrongMask(Broken):
    def harm(self, found, parameters):
        return Adapted(found.parameters, {"means": torch.zeros(len(parameters["means"]), 7, 3, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (InPlace, "changes the parameters it is given"),
        (Unkeyed, "called again with the same keys"),
        (Growing, "shapes never change"),
        (Unknown, "extra"),
        (Shared, "depends on which particles"),
        (Contagious, "NaN in particle"),
        (WrongMask, "mask of means"),
    ],
)
def test_a_broken_rule_of_growth_is_named(kind, said):
    with pytest.raises(AssertionError, match=said):
        check_particle(kind(config=SMALL, learning_rate=lambda step: 0.01))


def test_sound_growth_passes():
    check_particle(Broken(config=SMALL, learning_rate=lambda step: 0.01))
