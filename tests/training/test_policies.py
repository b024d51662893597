"""What every policy owes: limits, labels, ties, order; and what greedy coverage reaches of the best there is."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from mi2rage_engines.errors import DataError, InputError
from mi2rage_training.coverage import facility_location, k_centre, rank_normalised, unit_rows
from mi2rage_training.policies import Policy, PolicyConfig, Quota, Table, choose, decide, posterior_weights

RANKED = (Policy.RANDOM, Policy.SIMILARITY, Policy.INFORMATION, Policy.ADDED, Policy.POSTERIOR)


def table_of(seed: int = 0, parents: int = 24, links: int = 2, width: int = 2) -> Table:
    """Three labels in the ratio 4 : 2 : 1 or so, random scores and embeddings."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["None", "peer", "member_of"], parents, p=[0.6, 0.3, 0.1])
    labels[:3] = ["None", "peer", "member_of"]
    keys = [(p, link, child) for p in range(parents) for child in range(width) for link in range(1, links + 1)]
    count = len(keys)
    return Table(
        ids=np.array([f"s{p}/{child}.{link}" for p, link, child in keys]),
        parents=np.array([f"s{p}" for p, _, _ in keys]),
        labels=np.array([labels[p] for p, _, _ in keys]),
        links=np.array([link for _, link, _ in keys]),
        information_nats=rng.normal(size=count),
        added_nats=rng.normal(size=count),
        similarity=rng.normal(size=count),
        embeddings=rng.normal(size=(count, 5)).astype(np.float32),
    )


def taken(table: Table, order: Any) -> Table:
    """The same rows in another order, or some of them."""
    return Table(**{field.name: getattr(table, field.name)[order] for field in dataclasses.fields(table)})


def counts(values: np.ndarray, kept: np.ndarray) -> dict[str, int]:
    """How many are kept of each value."""
    return {str(value): int(kept[values == value].sum()) for value in np.unique(values)}


def configs(seed: int) -> list[PolicyConfig]:
    """Every policy, under limits drawn from the seed."""
    rng = np.random.default_rng(seed)
    found = []
    for policy in Policy:
        limits: dict[str, Any] = {
            "per_parent": int(rng.integers(1, 5)) if rng.random() < 0.8 else None,
            "per_label": int(rng.integers(1, 20)),
            "keep": float(rng.choice([0.05, 0.3, 0.7, 1.0])),
            "quota": list(Quota)[rng.integers(3)],
        }
        ranked = policy not in {Policy.DIVERSITY, Policy.K_CENTRE}
        found.append(PolicyConfig(policy, **limits, diversity=float(rng.choice([0, 0.5, 1])) if ranked else 0.0))
    return found


@pytest.mark.parametrize("seed", range(25))
def test_limits_hold_and_every_label_keeps_one(seed: int) -> None:
    table = table_of(seed)
    for config in configs(seed):
        kept = choose(table, config)
        eligible = table.links == 1 if config.policy is Policy.DIRECT else np.ones(len(table), bool)
        assert not kept[~eligible].any()
        by_label, of_label = counts(table.labels, kept), counts(table.labels, eligible)
        assert max(counts(table.parents, kept).values()) <= (config.per_parent or 4)
        assert all(1 <= by_label[label] <= min(config.per_label or 99, of_label[label]) for label in by_label)
        assert kept.sum() <= max(len(by_label) * 2, np.ceil(config.keep * eligible.sum() - 1e-9) + 2)


def covered(embeddings: np.ndarray, kept: np.ndarray) -> float:
    """What facility location adds up: each row's similarity to the nearest kept one."""
    units = unit_rows(embeddings)
    return float(np.maximum(units @ units[kept].T, 0).max(1).sum())


@pytest.mark.parametrize("seed", range(5))
def test_permuting_the_rows_permutes_the_result(seed: int) -> None:
    table = table_of(seed)
    order = np.random.default_rng(seed).permutation(len(table))
    for config in configs(seed):
        if config.policy in {Policy.ALL, Policy.DIRECT} and not config.diversity:
            continue  # all rows are tied there, and ties follow the order
        permuted, kept = choose(taken(table, order), config), choose(table, config)[order]
        if config.diversity == 1:  # two rows near each other may cover as much as each other, and the earlier is taken
            embeddings = taken(table, order).embeddings
            assert embeddings is not None and permuted.sum() == kept.sum(), config
            assert covered(embeddings, permuted) == pytest.approx(covered(embeddings, kept), rel=1e-4), config
        else:
            assert np.array_equal(permuted, kept), config


@pytest.mark.parametrize("quota", Quota)
def test_ties_go_to_the_earlier_row(quota: Quota) -> None:
    table = dataclasses.replace(table_of(), added_nats=np.zeros(96), labels=np.full(96, "peer"))
    kept = choose(table, PolicyConfig(per_parent=1, keep=0.5, quota=quota, per_label=99))
    assert np.array_equal(np.flatnonzero(kept), np.arange(0, 48, 4))


def test_the_best_of_each_parent() -> None:
    table = table_of()
    assert table.added_nats is not None
    kept = choose(table, PolicyConfig(per_parent=2))
    for parent in np.unique(table.parents):
        mine = table.parents == parent
        assert set(table.added_nats[mine & kept]) == set(np.sort(table.added_nats[mine])[-2:])


@pytest.mark.parametrize("policy", [*RANKED, Policy.DIVERSITY, Policy.K_CENTRE])
def test_a_rich_label_does_not_win(policy: Policy) -> None:
    table = table_of()
    rich = np.where(table.labels == "None", 9.0, 0.0)
    table = dataclasses.replace(table, information_nats=rich, added_nats=rich, similarity=rich)
    whole = counts(table.labels, np.ones(len(table), bool))
    kept = counts(table.labels, choose(table, PolicyConfig(policy, keep=0.25)))
    assert kept == {label: count // 4 for label, count in whole.items()}


def test_balanced_labels_share_what_one_cannot_take() -> None:
    table = table_of(parents=30)
    whole = counts(table.labels, np.ones(len(table), bool))
    poorest = min(whole, key=lambda label: whole[label])
    kept = counts(table.labels, choose(table, PolicyConfig(keep=0.5, quota=Quota.BALANCED)))
    assert sum(kept.values()) == 60
    assert kept[poorest] == min(whole[poorest], 20)
    others = [count for label, count in kept.items() if label != poorest]
    assert max(others) - min(others) <= 1
    kept = counts(table.labels, choose(table, PolicyConfig(per_label=5, quota=Quota.BALANCED)))
    assert set(kept.values()) == {min(5, whole[poorest]), 5}


def test_posterior_draws_siblings_by_their_likelihood() -> None:
    parents, odds = 6000, np.array([0.6, 0.3, 0.1])
    ids = np.array([f"p{i // 3}/{i % 3}" for i in range(3 * parents)])
    table = Table(
        ids=ids,
        parents=np.array([key.split("/")[0] for key in ids]),
        labels=np.where(np.arange(3 * parents) < 3 * parents // 2, "a", "b"),
        links=np.ones(3 * parents, np.int64),
        information_nats=np.tile(np.log(odds) + 0.7, parents),
    )
    first = choose(table, PolicyConfig(Policy.POSTERIOR, per_parent=1)).reshape(-1, 3).mean(0)
    assert first == pytest.approx(odds, abs=0.02)  # three standard errors
    both = choose(table, PolicyConfig(Policy.POSTERIOR, per_parent=2)).reshape(-1, 3)
    left_out = [
        sum(odds[i] * odds[j] / (1 - odds[i]) for i, j in ((a, b), (b, a))) for a, b in ((1, 2), (0, 2), (0, 1))
    ]
    assert 1 - both.mean(0) == pytest.approx(left_out, abs=0.02)
    half = choose(table, PolicyConfig(Policy.POSTERIOR, keep=1 / 3)).reshape(-1, 3)
    assert np.all(half.sum(1) == 1)  # every parent's first draw comes before anyone's second
    again = choose(table, PolicyConfig(Policy.POSTERIOR, per_parent=1, seed=1)).reshape(-1, 3)
    assert (
        0.3
        < np.mean(
            again.argmax(1) == choose(table, PolicyConfig(Policy.POSTERIOR, per_parent=1)).reshape(-1, 3).argmax(1)
        )
        < 0.6
    )


def test_posterior_weights_by_hand() -> None:
    table = taken(table_of(), np.array([0, 1, 4, 5, 6]))
    table = dataclasses.replace(table, information_nats=np.log([0.2, 0.6, 1e-300, 0.5, 0.5]))
    assert posterior_weights(table) == pytest.approx([0.5, 1.5, 0, 1.5, 1.5])
    assert posterior_weights(table, sharpness=0.0) == pytest.approx(np.ones(5))


def test_a_control_has_the_size_of_what_it_is_compared_with() -> None:
    table = table_of()
    kept = choose(table, PolicyConfig(per_parent=2, keep=0.4))
    for policy in (Policy.RANDOM, Policy.SIMILARITY, Policy.DIVERSITY):
        control = choose(table, PolicyConfig(policy), count_like=kept)
        assert counts(table.labels, control) == counts(table.labels, kept)
        assert max(counts(table.parents, control).values()) <= 2
        assert not np.array_equal(control, kept)
    every = choose(table, PolicyConfig(per_parent=1))
    assert set(counts(table.parents, choose(table, PolicyConfig(Policy.RANDOM), every)).values()) == {1}


@pytest.mark.parametrize("seed", range(20))
def test_greedy_facility_location_is_near_the_optimum(seed: int) -> None:
    units = unit_rows(np.random.default_rng(seed).normal(size=(9, 3)).astype(np.float32))
    similar = np.maximum(units @ units.T, 0)

    def coverage(rows: Any) -> float:
        return float(similar[:, list(rows)].max(1).sum())

    alone = facility_location(units, np.arange(9), limit=3, cap=1, merits=np.zeros(9), diversity=1.0)
    assert coverage(alone.rows) >= (1 - 1 / np.e) * max(map(coverage, itertools.combinations(range(9), 3)))
    assert coverage(alone.rows) == pytest.approx(alone.gains.sum() * similar.sum(0).max(), rel=1e-5)
    groups = np.arange(9) // 3
    pairs = [rows for rows in itertools.combinations(range(9), 3) if len(set(groups[list(rows)])) == 3]
    grouped = facility_location(units, groups, limit=3, cap=1, merits=np.zeros(9), diversity=1.0)
    assert coverage(grouped.rows) >= 0.5 * max(map(coverage, pairs))


def test_lazy_gains_are_those_of_plain_greedy() -> None:
    rng = np.random.default_rng(3)
    units, merits = unit_rows(rng.normal(size=(400, 8)).astype(np.float32)), rng.random(400)
    similar = np.maximum(units @ units.T, 0).astype(np.float64)
    found = facility_location(units, np.arange(400), limit=60, cap=1, merits=merits, diversity=0.7)
    covered, rows = np.zeros(400), []
    for _ in range(60):
        gains = 0.3 * merits + 0.7 * np.maximum(similar - covered[:, None], 0).sum(0) / similar.sum(0).max()
        gains[rows] = -1
        rows.append(int(gains.argmax()))
        covered = np.maximum(covered, similar[:, rows[-1]])
    assert found.rows.tolist() == rows
    assert np.all(np.diff(found.gains) <= 1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_k_centre_reaches_twice_the_best_radius(seed: int) -> None:
    units = unit_rows(np.random.default_rng(seed).normal(size=(9, 3)).astype(np.float32))
    angles = np.arccos(np.clip(units @ units.T, -1, 1))
    found = k_centre(units, np.arange(9), limit=3, cap=1)
    best = min(angles[:, list(rows)].min(1).max() for rows in itertools.combinations(range(9), 3))
    assert angles[:, found.rows].min(1).max() <= 2 * best + 1e-6  # Gonzalez (1985), on the sphere's own metric
    assert np.all(np.diff(found.gains) <= 1e-6)


def test_diversity_leaves_copies_out() -> None:
    table = table_of(parents=6, links=1, width=1)
    embeddings = np.eye(3, dtype=np.float32)[[0, 0, 0, 0, 1, 2]]
    table = dataclasses.replace(table, labels=np.full(6, "a"), embeddings=embeddings, added_nats=np.arange(6, 0, -1.0))
    best = PolicyConfig(keep=0.5)
    assert np.flatnonzero(choose(table, best)).tolist() == [0, 1, 2]
    assert np.flatnonzero(choose(table, dataclasses.replace(best, diversity=0.9))).tolist() == [0, 4, 5]
    assert np.flatnonzero(choose(table, PolicyConfig(Policy.K_CENTRE, keep=0.5))).tolist() == [0, 4, 5]


def test_ranks_are_shares_of_what_lies_below() -> None:
    values = np.array([3.0, 1.0, 3.0, 2.0, 9.0])
    assert rank_normalised(values, values).tolist() == [0.5, 0, 0.5, 0.25, 1]


def test_reasons() -> None:
    table = dataclasses.replace(taken(table_of(links=1, width=3), np.arange(3)), added_nats=np.array([1.0, 3.0, 2.0]))
    assert decide(table, PolicyConfig(per_parent=2, keep=0.5)).reasons == (
        "dropped: label quota (1 of 3 kept)",
        "kept: rank 1 of 3 siblings",
        "dropped: label quota (1 of 3 kept)",
    )
    assert decide(table, PolicyConfig(per_parent=1)).reasons[2] == "dropped: per-parent limit (rank 2 of 3)"
    assert decide(table, PolicyConfig(Policy.ALL)).reasons == ("kept: all",) * 3
    assert decide(table, PolicyConfig(keep=0.3, quota=Quota.NONE)).reasons[0] == (
        "dropped: overall share (1 of 3 kept)"
    )
    table = dataclasses.replace(table, links=np.array([1, 2, 1]))
    assert decide(table, PolicyConfig(Policy.DIRECT)).reasons[1] == "dropped: not the first link"


@pytest.mark.parametrize(
    "settings",
    [
        {"per_parent": 0},
        {"per_label": 0},
        {"keep": 0.0},
        {"keep": 1.5},
        {"diversity": 2.0},
        {"policy": Policy.DIVERSITY, "diversity": 0.5},
        {"quota": Quota.BALANCED},
    ],
)
def test_impossible_limits_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        PolicyConfig(**settings)


def test_what_the_policy_lacks_is_named() -> None:
    table = table_of()
    assert table.added_nats is not None
    with pytest.raises(DataError, match="policy added: came without added_nats"):
        choose(dataclasses.replace(table, added_nats=None), PolicyConfig())
    with pytest.raises(DataError, match="without embeddings"):
        choose(dataclasses.replace(table, embeddings=None), PolicyConfig(diversity=0.5))
    with pytest.raises(DataError, match=r"s0/0.1: came nan"):
        choose(dataclasses.replace(table, added_nats=table.added_nats * np.nan), PolicyConfig())
    with pytest.raises(DataError, match="rows came"):
        dataclasses.replace(table, links=np.ones(3, np.int64))
    with pytest.raises(DataError, match="several labels"):
        choose(dataclasses.replace(table, labels=table.ids), PolicyConfig())
