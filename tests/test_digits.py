"""The methods beside a plain implementation of them: the benchmark of the digits, at small size."""

import json

from steering.runner.folder import RunFolder
from workflows import bench_digits


def test_the_library_does_what_a_plain_implementation_does_and_rehearsal_pays(tmp_path):
    bench_digits.main(RunFolder(tmp_path), ["--seeds", "3"])
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["derpp_over_er"] > 10
    for method in bench_digits.STRATEGIES:
        assert figures[method]["accuracy"] > 0.8 * figures[method]["reference"]
        assert figures[method]["difference_in_standard_errors"] > -3
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
