"""The loss curve: a picture with a line for all that was measured, and for nothing else."""

import pytest

from llama.training.curve import draw_loss_curve

TRAINED = [{"step": step, "loss": 3 / step} for step in range(1, 6)]
LINES = {
    "one line": TRAINED[:1],
    "no evaluation": TRAINED,
    "with loss": [{"step": 0, "held_out": {"loss": 3.0, "n": 4}}, *TRAINED],
    "with accuracy": [*TRAINED, {"step": 5, "held_out": {"loss": 1.0, "accuracy": 0.75, "n": 4}}],
    "a loss that is not a number": [*TRAINED, {"step": 6, "loss": float("nan")}],
}


@pytest.mark.parametrize("case", LINES)
def test_the_loss_curve_is_drawn(tmp_path, monkeypatch, case):
    """A PNG of the stated size, with a curve for all there is and none for what is not."""
    from matplotlib import pyplot as plt
    from matplotlib.image import imread

    drawn = []
    monkeypatch.setattr(plt, "close", lambda figure, close=plt.close: (drawn.append(figure), close(figure)))
    draw_loss_curve(LINES[case], tmp_path / "loss.png", "tiny on imdb (bundled sample)")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (540, 960) and picture[..., :3].std() > 0.02
    (figure,) = drawn
    left, *right = figure.axes
    labels = [line.get_label() for axis in figure.axes for line in axis.get_lines()]
    assert left.get_title() == "tiny on imdb (bundled sample)"
    assert list(left.get_lines()[0].get_xdata()) == [line["step"] for line in LINES[case] if "loss" in line]
    assert ("held-out loss" in labels) == case.startswith("with ")
    assert ("held-out accuracy" in labels) == (case == "with accuracy") == bool(right)
    assert [text.get_text() for text in left.figure.legends[0].get_texts()] == labels


def test_the_running_mean_begins_as_the_mean_of_all_losses(tmp_path, monkeypatch):
    """So that the first loss does not weigh for ever; and no steps make no picture."""
    from matplotlib import pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    draw_loss_curve(TRAINED, tmp_path / "loss.png", "")
    mean = drawn[0].axes[0].get_lines()[1].get_ydata()
    assert mean == pytest.approx([sum(line["loss"] for line in TRAINED[:n]) / n for n in range(1, 6)])
    monkeypatch.undo()
    plt.close(drawn[0])
    draw_loss_curve([{"step": 0, "held_out": {"loss": 1.0}}], tmp_path / "none.png", "")
    assert not (tmp_path / "none.png").exists()
