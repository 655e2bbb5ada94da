"""Which versions the matrix of forgetting has."""

from steering.runner.judging import spread


def test_what_is_wanted_is_in_and_the_rest_is_spread_evenly():
    assert spread(range(100), {0, 40, 99}, 8) == [0, 10, 30, 40, 50, 69, 89, 99]
    assert spread(range(5), {0, 4}, 8) == [0, 1, 2, 3, 4]
    assert spread(range(9), {0, 3, 6, 8}, 2) == [0, 3, 6, 8]
    assert spread([], set(), 8) == []
