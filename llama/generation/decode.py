"""From requests to answers: a queue of prompts, a batch of texts that grow, and ranks that end together."""

from collections.abc import Callable, Iterator, Sequence

from llama.boundary.errors import UserError
from llama.generation.batch import Batch, NextLogits
from llama.generation.growing import Growing
from llama.generation.request import Answer, Request
from llama.model import Llama

STREAM = 4096  # tokens of prompts that are read in one forward; a longer prompt is read alone


def generate(
    model: Llama | Batch,
    requests: Sequence[Request],
    batch_size: int,
    any_rank: Callable[[bool], bool] = bool,
    next_logits: NextLogits | None = None,
) -> Iterator[tuple[int, Answer]]:
    """The answers, each with the index of its request, as they are completed. At most `batch_size` texts at a time.

    As soon as texts end, prompts that wait are read, STREAM tokens at once. Instead of a model, a chat gives the Batch
    that remembers its last turn.

    Under FSDP the ranks compute every forward together: any_rank(live) says whether any rank still has work, and ranks
    without work take part until none has. Raises UserError before the first forward if the model cannot read a prompt,
    and later if logits are NaN. In both cases it waits until all ranks have ended.
    """
    batch = model if isinstance(model, Batch) else Batch(model, next_logits)
    try:
        waiting = []
        for number, request in enumerate(requests):
            reason = Growing.of(number, request, 0, batch.positions).limit(batch.positions)
            if reason:
                yield number, Answer([], reason)
            else:
                waiting.append((number, request))
        waiting.reverse()
        while any_rank(bool(batch.texts or waiting)):  # each turn is one forward
            if waiting and len(batch) < batch_size:
                yield from batch.add(next_prompts(waiting, batch_size - len(batch)))
            elif batch.texts:
                yield from batch.step()
            else:
                batch.keep_company()
    except UserError:
        while any_rank(False):
            batch.keep_company()
        raise
    finally:
        batch.clear()


def next_prompts(waiting: list[tuple[int, Request]], at_most: int) -> list[tuple[int, Request]]:
    """Take prompts off the end of those that wait: one at least, and as many as fit into one stream."""
    taken: list[tuple[int, Request]] = []
    tokens = 0
    while waiting and len(taken) < at_most:
        tokens += len(waiting[-1][1].prompt)
        if taken and tokens > STREAM:
            break
        taken.append(waiting.pop())
    return taken
