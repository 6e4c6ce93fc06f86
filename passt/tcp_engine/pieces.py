"""The type of the out-of-order queue of a connection: a list, which no compiled class can inherit (`setup.py`)."""

from __future__ import annotations

Piece = tuple[int, memoryview, int]  # sequence number, payload, FIN bit


class Pieces(list[Piece]):
    """The out-of-order queue of one connection (`out_of_order.py`), and its cost in bytes."""

    __slots__ = ("cost",)

    def __init__(self) -> None:
        super().__init__()
        self.cost = 0


NO_PIECES = Pieces()
