"""What attention remembers of texts that are read a few tokens at a time: the keys and values of every layer.

Pure torch. Knows neither layers nor positions: keys come in as attention uses them, with rotary positions applied.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class KeyValues:
    """Keys and values of the `length` tokens read so far, of a batch of texts that are all as long.

    Room is doubled as it fills, so that reading n tokens copies O(n) of them.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the next s tokens, [s, b, kv heads, d]; returns those of all so far, [b, kv heads, length + s, d].

        `length` does not change before `advance`, since every layer appends the same tokens.
        """
        stop = self.length + key.shape[0]
        room = self._layers.get(layer)
        if room is None or room[0].shape[2] < stop:
            room = self._layers[layer] = self._grow(room, key, stop)
        for held, new in zip(room, (key, value), strict=True):
            held[:, :, self.length : stop] = new.permute(1, 2, 0, 3)
        return room[0][:, :, :stop], room[1][:, :, :stop]

    def advance(self, count: int) -> None:
        """Every layer has appended `count` tokens."""
        self.length += count

    def select(self, rows: Tensor) -> None:
        """Texts `rows` [texts from now on] of those held, in that order; one may be taken several times."""
        self._layers = {
            layer: (keys.index_select(0, rows.to(keys.device)), values.index_select(0, rows.to(keys.device)))
            for layer, (keys, values) in self._layers.items()
        }

    def _grow(self, room: tuple[Tensor, Tensor] | None, key: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        _, batch, heads, size = key.shape
        capacity = stop if room is None else max(stop, 2 * room[0].shape[2])
        grown = (key.new_empty(batch, heads, capacity, size), key.new_empty(batch, heads, capacity, size))
        for old, new in zip(room or (), grown, strict=False):
            new[:, :, : self.length] = old[:, :, : self.length]
        return grown


@dataclass(frozen=True)
class Continuation:
    """The next tokens of texts that attention remembers; stands where a mask is handed on.

    `document_lengths`: of the first tokens, as attention takes them where nothing is remembered. `visible`: of later
    ones, which keys each may see: bool [b, 1, s, length + s]; None: all of them.
    """

    past: KeyValues
    document_lengths: Tensor | None = None
    visible: Tensor | None = None


def visible_keys(positions: Tensor, first: int) -> Tensor | None:
    """For `Continuation.visible`: tokens from `first` on may see their own document up to themselves.

    positions [b, length]: how many tokens of its document precede each token.
    """
    index = torch.arange(positions.shape[1])
    begins = (index - positions)[:, first:]
    if len(index) - first == 1 and not begins.any():
        return None
    return ((index <= index[first:, None]) & (index >= begins[:, :, None]))[:, None]
