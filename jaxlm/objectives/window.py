"""What an objective asks of the data: how many raw tokens an example reads, and from where."""

from typing import NamedTuple


class Window(NamedTuple):
    """The raw tokens of one example.

        length 5, stride 4    tokens     a b c d e f g h i
                              example 0  a b c d e
                              example 1          e f g h i

    length: raw tokens that an example reads.
    stride: raw tokens from the start of one example to the start of the next.
    within_document: an example never reads past the end of its document.
    pair: each example also brings a random example of another document, under the key `other`.
    sentences: examples say which tokens start a sentence, under the key `sentence_starts`.
    """

    length: int
    stride: int
    within_document: bool = False
    pair: bool = False
    sentences: bool = False
