"""Chosen rows: ties, one per row, and draws that are uniform and the same in NumPy."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch

from pipeline.hashing import row_hash, splitmix64
from pipeline.kernels.ranked import STRATA, Ranked
from tests.laws.drawn import make_presentations, make_site, split


def shown_z(z_LSU, **fields):
    z_LSU = torch.as_tensor(z_LSU, dtype=torch.float32)
    site = make_site(np.ones((z_LSU.shape[2], 1)))
    return make_presentations(site, torch.zeros(*z_LSU.shape[:2], 1, 1), z_LSU=z_LSU, **fields)


def test_ties_go_to_the_smaller_uid_then_position() -> None:
    z = torch.ones(6, 4, 1)
    uid_N = torch.tensor([50, 10, 40, 20, 60, 30])
    for kind in ("greatest", "smallest"):
        state = Ranked(kind, 3).observe(shown_z(z, uid_N=uid_N))
        assert state["uid"].tolist() == [[10, 20, 30]]
        assert state["position"].tolist() == [[0, 0, 0]]


def test_positions_are_those_named_not_those_stored() -> None:
    z = torch.tensor([[[1.0], [5.0], [5.0]]])
    state = Ranked("greatest", 1).observe(shown_z(z, position_LS=torch.tensor([[7, 9, 8]])))
    assert state["position"].tolist() == [[8]]


def test_a_row_is_chosen_once() -> None:
    # two entries of row 0 hold the three greatest z
    z = torch.tensor([[[9.0], [8.0]], [[1.0], [2.0]], [[7.0], [3.0]]])
    given = shown_z(z, row_L=torch.tensor([0, 1, 0]), position_LS=torch.tensor([[0, 1], [0, 1], [2, 3]]))
    state = Ranked("greatest", 3).observe(given)
    assert state["uid"].tolist() == [[0, 1, -1]]
    assert state["z"][0, :2].tolist() == [9, 2]


def test_only_firing_rows_are_drawn() -> None:
    z = torch.randn(200, 1, 3, generator=torch.Generator().manual_seed(0))
    state = Ranked("random", 20, seed=3).observe(shown_z(z))
    assert (state["z"] > 0).all()


def test_draws_are_the_smallest_hashes_of_seed_unit_and_uid() -> None:
    z = torch.ones(100, 1, 2)
    uid_N = torch.randperm(100, generator=torch.Generator().manual_seed(1)) * 10**9
    state = Ranked("random", 5, seed=3).observe(shown_z(z, uid_N=uid_N))
    for unit in range(2):
        start = splitmix64(splitmix64(3) + unit)
        assert state["uid"][unit].tolist() == sorted(uid_N.tolist(), key=lambda uid: splitmix64(start ^ uid))[:5]


def test_draws_are_uniform_and_independent_of_order() -> None:
    z = torch.ones(50, 1, 400)
    parts = split(shown_z(z), torch.arange(50) % 7)
    primitive = Ranked("random", 10, seed=1)
    drawn = reduce(primitive.merge, map(primitive.observe, parts))["uid"]
    times = drawn.flatten().bincount(minlength=50).double()
    # 400 units draw 10 of 50 rows: 80 ± 8 each
    assert float((times - 80).abs().max()) < 4 * 8
    assert torch.equal(drawn, primitive.observe(shown_z(z))["uid"])


def test_the_hash_has_known_values() -> None:
    # splitmix64's published sequence from state 0, without the sign bit
    assert splitmix64(0) == 0x6220A8397B1DCDAF
    uid = torch.tensor([0, 1, 2**40])
    wanted = [splitmix64(splitmix64(splitmix64(9) + 2) ^ one) for one in uid.tolist()]
    assert row_hash(uid, seed=9, unit=2).tolist() == wanted
    assert row_hash(uid, seed=9, unit=torch.tensor(2)).tolist() == wanted


def test_each_octave_keeps_its_own() -> None:
    z = torch.tensor([-300.0, -3.0, -2.5, -2.0, 0.0, 1e-9, 1.0, 1.9, 2.0, 3.9, 300.0])
    state = Ranked("octave", 2).observe(shown_z(z[:, None, None]))
    slots = state["uid"].view(STRATA, 2)
    found = {stratum: sorted(uids[uids >= 0].tolist()) for stratum, uids in enumerate(slots) if (uids >= 0).any()}
    assert found.pop(0) == [0]
    assert found.pop(STRATA - 1) == [10]
    assert found.pop(STRATA // 2) == [4, 5]
    assert found.pop(STRATA // 2 + 8) == [6, 7]
    assert found.pop(STRATA // 2 + 9) == [8, 9]
    [(stratum, kept)] = found.items()
    assert stratum == STRATA // 2 - 10
    assert len(kept) == 2


@pytest.mark.parametrize("kind", ["greatest", "smallest", "match", "random", "octave"])
def test_fewer_rows_than_places_leave_the_rest_empty(kind: str) -> None:
    site = make_site(np.eye(4)[:2])
    given = make_presentations(site, np.random.default_rng(0).normal(size=(2, 4)) + 1)
    state = Ranked(kind, 5).observe(given)
    empty = state["uid"] < 0
    assert (state["position"][empty] == -1).all()
    assert all(state[name][empty].isnan().all() for name in ("z", "a", "match"))
