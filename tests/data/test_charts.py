"""Charts of a data set: bars show what the data has, and nothing that the bins or the axis made."""

import matplotlib.figure
import numpy as np
import pytest
from samples import loaded, reviews, write_rows

from llama.data import charts
from llama.data.examples import encode_file
from llama.data.sources import TINY_TOKENIZER
from llama.data.templates import TEMPLATES


@pytest.mark.parametrize("lowest, highest", [(7, 7), (0, 49), (0, 50), (95, 159), (1, 205), (1, 361), (3, 8192)])
def test_every_bin_holds_the_same_number_of_whole_numbers(lowest, highest):
    """As many examples of each length are bars of one height: 361 lengths in 50 equal parts made a comb."""
    lengths = np.arange(lowest, highest + 1)
    bins = charts.bins_of(lengths)
    counts = np.histogram(lengths, bins)[0]
    assert counts.sum() == len(lengths) and len(counts) <= charts.MOST_BINS
    assert len(set(counts[:-1])) <= 1 and 0 < counts[-1] <= counts[0]  # the last one may be begun only


@pytest.fixture
def axes(tmp_path, monkeypatch):
    """What `draw` draws of 200 examples to train on and 10 to test on: {max_length: axis of lengths.png}."""
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    rows = reviews(210)
    tokenizer = loaded(TINY_TOKENIZER)
    drawn = {}
    for max_length in (150, 2000):
        splits = {}
        for name, part in (("train", rows[:200]), ("test", rows[200:])):
            path = write_rows(tmp_path / f"{name}.jsonl", part)
            splits[name] = encode_file(path, TEMPLATES["imdb"], tokenizer, max_length)
        kept = []
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, _, kept=kept: kept.append(figure.axes))
        charts.draw(splits, (), max_length, tmp_path, "reviews")
        drawn[max_length] = kept[0][0]
    return drawn


def test_both_splits_have_the_same_bins_and_the_axis_ends_where_the_data_does(axes):
    """The limit is a line where an example reaches it, and else only words: it would squeeze the bars to the left."""
    for max_length, axis in axes.items():
        train, test = ([bar.get_x() for bar in container] for container in axis.containers)
        assert train == test and all(edge % 1 == 0.5 for edge in train)
        longest = train[-1] + axis.containers[0][0].get_width()
        assert axis.get_xlim()[1] < 1.2 * longest
        *_, limit = (text.get_text() for text in axis.get_legend().get_texts())
        assert f"--max_length {max_length}" in limit
    assert len(axes[150].lines) == 1 and axes[150].lines[0].get_xdata()[0] == 150
    assert "all are shorter" in limit and len(axes[2000].lines[0].get_xdata()) == 0
