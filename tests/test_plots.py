"""Figures show the data they were given: the data behind them is checked, not the pixels."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from pruning101.core import plots


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_curves_draw_the_mean_and_the_range_of_the_seeds():
    x, runs = [0, 1, 2], np.array([[1.0, 2, 3], [3.0, 4, 8]])
    ax = plots.curves({"method": (x, runs)}, xlabel="round", ylabel="accuracy (%)")
    assert np.allclose(ax.lines[0].get_ydata(), [2, 3, 5.5])
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1
    assert band[:, 1].max() == 8
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("round", "accuracy (%)")


def test_curves_are_told_apart_without_colour():
    series = {str(i): ([0, 1], [i, i]) for i in range(6)}
    ax = plots.curves(series, xlabel="x", ylabel="y")
    assert len({line.get_marker() for line in ax.lines}) == 6


def test_curves_refuse_a_length_that_does_not_fit():
    with pytest.raises(ValueError, match="'a' has 2 places but 3 values"):
        plots.curves({"a": ([0, 1], [1, 2, 3])}, xlabel="x", ylabel="y")


def test_histogram_splits_at_the_threshold():
    values = np.array([-2.0, -0.5, 0.1, 0.4, 1.0, 3.0])
    ax = plots.histogram(values, threshold=0.5, bins=10)
    everything, kept = (patch.get_data().values.sum() for patch in ax.patches)
    assert everything == 6
    assert kept == 4  # what lies on the threshold is kept


def test_bars_write_their_values_and_whiskers_reach_the_extremes():
    ax = plots.bars({"a": 2.0, "b": 5.0}, ylabel="MB", spread={"a": (1, 4), "b": (5, 5)})
    assert [text.get_text() for text in ax.texts] == ["2", "5"]
    whiskers = ax.containers[0].lines[2][0]
    ends = whiskers.get_segments()[0][:, 1]
    assert list(ends) == [1, 4]


def test_mask_image_refuses_a_convolution_mask():
    with pytest.raises(ValueError, match=r"shape \(2, 1, 3, 3\)"):
        plots.mask_image(np.ones((2, 1, 3, 3), dtype=bool))
