"""The methods beside a plain implementation of them: the benchmark of the digits, at small size."""

from steering.runner.folder import RunFolder
from workflows import bench_digits


def test_the_library_does_what_a_plain_implementation_does_and_rehearsal_pays(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    bench_digits.main(folder, ["--seeds", "3"])
    figures = folder.summary()
    assert figures["derpp_over_er"] > 10
    assert figures["er_ace_over_er"] > 5
    for method in bench_digits.STRATEGIES:
        assert figures[method]["accuracy"] > 0.8 * figures[method]["reference"]
        assert figures[method]["difference_in_standard_errors"] > -3
    assert (folder.path / "accuracy.png").stat().st_size > 1000
