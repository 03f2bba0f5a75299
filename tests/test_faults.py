"""A sample of `make test-faults`: what writes is killed, has no room, is damaged, and goes on."""

import pytest
from faults import killer, sweep

pytestmark = pytest.mark.skipif(bool(killer.missing()), reason=killer.missing())

POINTS = {  # points of each scenario, how many of these are killed twice, full disks
    "train": (6, 1, 1),
    "train-last": (6, 1, 1),
    "prepare": (10, 2, 2),
    "prepare-over": (10, 2, 1),
    "encode": (8, 2, 2),
    "encode-over": (8, 1, 1),
    "encode-parquet": (6, 1, 1),
    "save": (8, 1, 2),
    "save-over": (8, 1, 1),
    "card": (4, 1, 1),
}


@pytest.fixture(scope="module")
def servers():
    with sweep.servers_for(2) as servers:
        yield servers


@pytest.mark.parametrize("name", POINTS)
def test_killed_or_out_of_disk_and_run_again(servers, name):
    most, second, disks = POINTS[name]
    result = sweep.sweep(servers, name, most, second, disks)
    assert result["killed"] > most / 2 and not result["failures"], sweep.reasons(result)


def test_a_damaged_checkpoint_is_refused_by_name_or_left_for_the_one_before(servers):
    result = sweep.damage_sweep(servers, "train-last", most=10)
    assert not result["failures"], sweep.reasons(result)


# which tests/test_run.py has, in less time
QUICK = [name for name in sweep.CHECKS if name != "stopped"]


def test_days_of_work_survive_the_rest(servers):
    results = sweep.check_all(servers, QUICK)
    failed = [f"{r['name']}: {sweep.reasons(r)}" for r in results if r["failures"]]
    assert not failed, "\n".join(failed)


def test_mutated_inputs_are_read_or_refused_in_a_sentence(servers):
    result = sweep.fuzz_all(servers, inputs=40, at_once=20)
    assert result["tried"] == 40 and not result["failures"], sweep.reasons(result)


def test_every_point_is_different():
    operations = [
        ("open", 0, "a"),
        ("write", 100, "a"),
        ("write", 1, "a"),
        ("fsync", 0, "a"),
        ("-unlink", 0, "b"),
        ("rename", 0, "c"),
    ]
    assert sweep.points(operations) == [[1, 0], [2, 0], [2, 1], [3, 0], [6, 0]]
    assert sweep.rooms(operations, 3) == [0, 50, 100]
    assert sweep.spread(range(100), 4) == [12, 37, 62, 87]
    assert sweep.spread("abc", 9) == ["a", "b", "c"]
