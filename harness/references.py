"""The transcripts of finished baselines, packed: a driver of a fleet holds hundreds until their dependents have run."""

import pickle
import threading
import zlib
from collections import OrderedDict
from typing import Any

from harness.transcript import Transcript

#: So many lie there unpacked; a baseline's dependents mostly run one after the other.
_OPEN = 4


def pack(value: object) -> bytes:
    """Any of our own values, ten times as small as it is in memory, and exact: JSON has no infinities."""
    return zlib.compress(pickle.dumps(value), 1)


def unpack(packed: bytes) -> Any:
    """What `pack` was given. For our own bytes only."""
    return pickle.loads(zlib.decompress(packed))


class References:
    """Cell key -> transcript, None for a baseline that failed. Safe for threads."""

    def __init__(self) -> None:
        self._packed: dict[str, bytes | None] = {}
        self._open: OrderedDict[str, Transcript] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._packed

    def __setitem__(self, key: str, transcript: Transcript | None) -> None:
        packed = None if transcript is None else pack(transcript)
        with self._lock:
            self._packed[key] = packed
            self._open.pop(key, None)

    def there(self, key: str) -> bool:
        """Whether that baseline gave a transcript."""
        return self._packed.get(key) is not None

    def get(self, key: str) -> Transcript | None:
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
            packed = self._packed.get(key)
        if packed is None:
            return None
        transcript: Transcript = unpack(packed)
        with self._lock:
            self._open[key] = transcript
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return transcript

    def __getitem__(self, key: str) -> Transcript | None:
        if key not in self._packed:
            raise KeyError(key)
        return self.get(key)

    @property
    def bytes(self) -> int:
        """What is held packed."""
        return sum(len(packed) for packed in self._packed.values() if packed)
