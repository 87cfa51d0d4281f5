"""Whether a model that holds a base was changed by others."""

from __future__ import annotations

import xxhash
from torch import Tensor, nn

from dpp_lightning.storage.locate import few_names
from dpp_lightning.tensors.fingerprint import raw_bytes
from dpp_lightning.tensors.names import check_prunable
from dpp_lightning.tensors.shards import is_dtensor

_UNKNOWN = (-1, -1)  # a state that no tensor has


class BaseGuard:
    """Knows a model's tensors as they are now, and notices when they are others.

    Args:
        model: holds the base; all its tensors are hashed once.

    Raises:
        ValueError: quantised weights, tensors in shards, or tensors that were made in inference mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        check_prunable(dict(model.named_parameters()))
        if made_there := [name for name, tensor in self._tensors.items() if tensor.is_inference()]:
            raise ValueError(f"{few_names(made_there)} were made in inference mode: load the model outside of it")
        if sharded := [name for name, tensor in self._tensors.items() if is_dtensor(tensor)]:
            raise ValueError(f"a pool needs whole tensors, and {few_names(sharded)} are in shards: take one device")
        self._digests = {name: _digest(tensor) for name, tensor in self._tensors.items()}
        self._persistent = model.state_dict().keys()
        self._inside: list[tuple[int, int]] | None = None
        self._written_inside: set[str] = set()
        self.look()

    def open(self) -> None:
        """What is written from now on, until :meth:`close`, others write."""
        self._inside = self._state()

    def close(self) -> None:
        """What is written from now on the pool writes; what was written before, :meth:`check` will hash."""
        if self._inside is not None:
            states = zip(self._tensors, self._state(), self._inside, strict=True)
            written = {name for name, now, then in states if now != then and name in self._persistent}
            modules = {name.rpartition(".")[0] for name in written}  # a norm writes its statistics past torch's count
            self._written_inside |= {name for name in self._persistent if name.rpartition(".")[0] in modules}
            self._inside = None

    def look(self) -> None:
        """Take the model as it is for the base, but for what others wrote; may be called again."""
        self.close()
        states = zip(self._tensors, self._state(), strict=True)
        self._seen = [_UNKNOWN if name in self._written_inside else now for name, now in states]

    def check(self) -> None:
        """Check that the model is the base still; what was written to is hashed, as another may have put it back.

        Raises:
            RuntimeError: it is not; the tensors are named.
        """
        states = zip(self._tensors, self._state(), self._seen, strict=True)
        written = [name for name, now, seen in states if now != seen]
        if changed := [name for name in written if _digest(self._tensors[name]) != self._digests[name]]:
            raise RuntimeError(
                f"{few_names(changed)} of the model changed since the pool was made, by training, a cast, or another "
                "delta: take that back, or make a new pool of the base"
            )
        self._written_inside.clear()

    def _state(self) -> list[tuple[int, int]]:
        """Of each tensor where it lies, and how often torch wrote to it."""
        return [(tensor.data_ptr(), tensor._version) for tensor in self._tensors.values()]


def _digest(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(raw_bytes(tensor.detach()))
