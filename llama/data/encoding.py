"""Segments become ids and labels.

Each segment is encoded on its own and the ids are joined. A tokenizer merges letters across any border: encoded
together, the end of a prompt and the start of its answer may become one token, and the prompt alone, at inference,
never ends in that token. Encoded apart, the prompt at inference is a prefix of what was trained on. The price: the ids
may differ from those of the whole text.
"""

from collections.abc import Sequence
from typing import NamedTuple

from llama.data.templates import END, Segment
from llama.data.tokenizer import Tokenizer

Segments = Sequence[Segment]  # of one row


class Encoded(NamedTuple):
    """One example: its ids, for each id whether it is a label (part of an answer), and whether any id was cut."""

    ids: list[int]
    is_answer: list[bool]
    was_cut: bool


def encode_rows(
    rows: Sequence[Segments], tokenizer: Tokenizer, max_length: int, truncate_side: str, answer_room: int = 0
) -> list[Encoded | None]:
    """Examples of at most `max_length` tokens. None for a row that has an answer, but no label of it fits.

    First the prompt's segments that may be cut are cut, at `truncate_side`. If that is not enough and the answer may be
    cut, the end of the example is cut, back to the last label: a cut answer has no end token.

    `answer_room`: the length of the longest answer. Each prompt is cut so that this many tokens stay free. So a prompt
    is cut at the same place whatever its answer is, and also at inference, where it has none.
    """
    ids = _encode_texts(rows, tokenizer)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    examples = []
    for segments in rows:
        pieces = []
        for i, segment in enumerate(segments):
            starts_text = i == 0 or segment.starts_text
            if not segment.control:
                pieces.append(ids[starts_text][segment.text])
                continue
            control = [tokenizer.eos_id if segment.text == END else tokenizer.control_id(segment.text)]
            if segment.text == END and pieces and pieces[-1][-1:] == control:
                control = []  # the text spells its end token itself, which --control_tokens allows
            pieces.append([*bos, *control] if starts_text else control)
        examples.append(_join(segments, pieces, len(bos), max_length, truncate_side, answer_room))
    return examples


def _encode_texts(rows: Sequence[Segments], tokenizer: Tokenizer) -> dict[bool, dict[str, list[int]]]:
    """{starts_text: {text: ids}} of all texts, each encoded once, in two batches that use all cores."""
    texts: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for segments in rows:
        for i, segment in enumerate(segments):
            if not segment.control:
                texts[i == 0 or segment.starts_text][segment.text] = None
    encoded = {}
    for starts_text, unique in texts.items():
        ids = tokenizer.encode_batch(list(unique), starts_text=starts_text)
        encoded[starts_text] = dict(zip(unique, ids, strict=True))
    return encoded


def _join(
    segments: Segments, pieces: list[list[int]], bos_count: int, max_length: int, side: str, answer_room: int
) -> Encoded | None:
    """One example from the ids of its segments. Its first `bos_count` ids are BOS, which is never cut."""
    answers = [segment for segment in segments if segment.answer]
    total = 0
    answer_length = 0
    for piece, segment in zip(pieces, segments, strict=True):
        total += len(piece)
        answer_length += len(piece) if segment.answer else 0
    excess = total + max(0, answer_room - answer_length) - max_length
    was_cut = excess > 0
    for i, segment in enumerate(segments):
        if excess > 0 and segment.may_cut and not segment.answer:
            kept_start = bos_count if i == 0 else 0
            cut = min(excess, len(pieces[i]) - kept_start)
            first = kept_start if side == "left" else len(pieces[i]) - cut
            pieces[i] = pieces[i][:first] + pieces[i][first + cut :]
            excess -= cut
    ids = []
    is_answer = []
    for piece, segment in zip(pieces, segments, strict=True):
        ids += piece
        is_answer += [segment.answer] * len(piece)
    if excess > 0:
        if not any(segment.may_cut for segment in answers):
            return None
        labels = [i for i, is_label in enumerate(is_answer[:max_length]) if is_label]
        length = labels[-1] + 1 if labels else 0
        del ids[length:], is_answer[length:]
    if is_answer and is_answer[0]:
        is_answer[0] = False  # no token comes before it that could predict it
    if answers and True not in is_answer:
        return None
    return Encoded(ids, is_answer, was_cut)
