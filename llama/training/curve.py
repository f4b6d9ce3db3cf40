"""loss.png: the training loss, and the held-out loss and accuracy where they were measured."""

from pathlib import Path

from llama.boundary.errors import printable


def draw_loss_curve(lines: list[dict], out: Path, title: str) -> None:
    """Draw the lines of a metrics.jsonl: every step's loss and its running mean, and what was held out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if not train:
        return
    steps, losses = zip(*train, strict=True)
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120)
    axis.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training loss, each step")
    axis.plot(steps, _running_mean(losses), color="#08519c", linewidth=1.8, label="training loss, running mean")
    tested = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
    tested_steps = [step for step, _ in tested]
    if tested:
        held_out = [metrics["loss"] for _, metrics in tested]
        axis.plot(tested_steps, held_out, "o-", color="#d94801", label="held-out loss")
    axis.set(xlabel="optimizer step", ylabel="loss (nats per label)", yscale="log")
    axis.set_title(printable(title).replace("$", r"\$"))  # matplotlib reads formulas between $
    axis.grid(alpha=0.25)
    handles, labels = axis.get_legend_handles_labels()
    if any("accuracy" in metrics for _, metrics in tested):
        right = axis.twinx()
        accuracy = [metrics["accuracy"] for _, metrics in tested]
        right.plot(tested_steps, accuracy, "s--", color="#238b45", label="held-out accuracy")
        right.set(ylabel="accuracy", ylim=(0, 1.02))
        more_handles, more_labels = right.get_legend_handles_labels()
        handles += more_handles
        labels += more_labels
    figure.legend(handles, labels, fontsize=8, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))  # leaves room for the legend below
    figure.savefig(out)
    plt.close(figure)


def _running_mean(losses: tuple[float, ...]) -> list[float]:
    smooth = []
    mean = losses[0]
    for loss in losses:
        mean += (loss - mean) * max(0.1, 1 / (len(smooth) + 1))
        smooth.append(mean)
    return smooth
