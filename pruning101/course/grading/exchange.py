"""What the judge and the worker know of each other's objects.

What is plain data (see `packing`) goes over as a copy; everything else (functions, generators,
objects of other classes) as a *handle*: a number that the receiver can only hand back.

Both sides remember which object is whose copy. So an object that comes back *is* the one that was
sent, and each message brings along what has changed in the objects that both sides hold: after a
call, the caller's tensors, modules and lists are as the callee left them. An object is kept for the
other side as long as that side holds its copy; lists and dicts, which cannot be watched, until the
outermost call is over.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import kinds, packing
from .channel import ExchangeError


class Exchange:
    """One side's memory of what it exchanged.

    A key is the number of an object: positive for one of this side's own, negative for the copy of
    one of the other side's. In a message it stands as its sender sees it. `stand_in` makes what
    stands here for a handle of the other side. A side that `guards` itself refuses objects which
    could run anything (see `kinds.check_inert`); the other one sends such objects as handles.
    """

    def __init__(self, stand_in: Callable[[], Any], *, guards: bool = True) -> None:
        self._stand_in = stand_in
        self.guards = guards
        self._given = 0  # the last key
        self._mine: dict[int, Any] = {}
        self._handles: set[int] = set()  # those of `_mine` that went as handles
        self._theirs: dict[int, Callable[[], Any]] = {}  # weak where Python allows it
        self._keys: dict[int, int] = {}  # of an object's id
        self._digests: dict[int, bytes] = {}  # of an object as both sides know it
        self._freed: list[int] = []
        self._held: list[Any] = []  # what the other side counts on until it speaks again

    def pack(self, value: Any, graph: Callable[..., Any] | None = None) -> "Packed":
        """A message that brings `value`, and every change of what both sides know.

        With `graph`, it also names the tensors in `value` that autograd computed from the other
        side's, together with a handle for `graph(outputs, inputs)`. Raises ExchangeError where
        `value` cannot be sent.
        """
        packer = packing.Packer(self)
        try:
            header: dict[str, Any] = {"value": packer.node(value)}
            shared = list(self._shared())
            for _, one in shared:
                packer.node(one)
            packer.describe()
            outputs = [] if graph is None else packer.computed()
            if graph is not None and outputs:
                inputs = [
                    one
                    for key, one in shared
                    if key < 0 and isinstance(one, Tensor) and one.requires_grad and one.is_leaf
                ]
                header["graph"] = packer.node((graph(outputs, inputs), outputs, inputs))
                packer.describe()
            header["objects"], buffers = packer.changes()
        except packing.BROKEN as error:
            raise ExchangeError(f"This cannot be handed over: {str(error)[:200]}") from None
        header["freed"] = list(self._freed)
        return Packed(self, packer, header, buffers)

    def unpack(self, header: dict[str, Any], buffers: list[memoryview]) -> tuple[Any, Any]:
        """The value that a message brings and its graph, or None, once its changes are made here.

        Raises ExchangeError where the message is malformed.
        """
        try:
            for key in header["freed"]:
                if key >= 0:
                    raise ExchangeError("A message frees what its sender does not hold.")
                self._drop(-key)
            with torch.inference_mode(False), torch.no_grad():
                unpacker = packing.Unpacker(self, header["objects"], buffers)
            if self.guards:
                objects = (one for _, one in self._shared() if kinds.known_class(type(one)))
                kinds.check_inert(objects, lambda one: self._keys.get(id(one), 0) > 0)
            value = unpacker.value(header["value"])
            graph = unpacker.value(header["graph"]) if "graph" in header else None
        except packing.BROKEN as error:
            raise ExchangeError(f"A message is malformed: {str(error)[:200]}") from None
        self._held = []
        return value, graph

    def handed_out(self, one: Any) -> Any:
        """`one`, if it went over as a handle; else ExchangeError: nothing else may be used from
        the other side.
        """
        if self._keys.get(id(one)) not in self._handles:
            raise ExchangeError("A message asks for the use of an object that is no handle.")
        return one

    def end_call(self) -> None:
        """Forget the lists and dicts of the outermost call, as the other side does now."""
        for key, one in list(self._shared()):
            if key not in self._handles and not _watchable(one):
                self._drop(key)

    # What packing needs.

    def copies(self, one: Any) -> bool:
        """Whether an object goes over as a copy; else as a handle."""
        if not kinds.is_plain(one):
            return False
        if not self.guards and kinds.known_class(type(one)):
            try:
                kinds.check_inert([one], lambda held: self._keys.get(id(held), 0) < 0)
            except ExchangeError:
                return False
        return True

    def is_handle(self, key: int) -> bool:
        """Whether an object of this side went over as a handle."""
        return key in self._handles

    def key(self, one: Any) -> int | None:
        """The key of an object that both sides know."""
        return self._keys.get(id(one))

    def find(self, key: int) -> Any:
        """The object of a key; None where this side has no copy of the other's object yet.

        Raises ExchangeError where the key was never given.
        """
        if key > 0 and key not in self._mine:
            raise ExchangeError("A message names an object that was never sent.")
        return self._mine[key] if key > 0 else self._theirs.get(key, lambda: None)()

    def adopt(self, key: int, one: Any) -> Any:
        """Remember `one` as the copy of the other side's object `key`."""
        if _watchable(one):
            self._theirs[key] = weakref.ref(one, partial(self._gone, key, id(one)))
        else:
            self._theirs[key] = lambda: one
        self._keys[id(one)] = key
        return one

    def stand_in(self, key: int) -> Any:
        """What stands here for a handle of the other side."""
        known = self.find(key)
        return self.adopt(key, self._stand_in()) if known is None else known

    def new_key(self) -> int:
        """A key that was never given."""
        self._given += 1
        return self._given

    def digest(self, key: int) -> bytes | None:
        """What the object was like when both sides last agreed."""
        return self._digests.get(key)

    def note(self, key: int, digest: bytes) -> None:
        """Note what an object is like on both sides."""
        self._digests[key] = digest

    def _shared(self) -> Iterator[tuple[int, Any]]:
        yield from list(self._mine.items())
        for key, reference in list(self._theirs.items()):
            one = reference()
            if one is not None:
                yield key, one

    def _gone(self, key: int, number: int, _: Any) -> None:
        self._theirs.pop(key, None)
        self._digests.pop(key, None)
        if self._keys.get(number) == key:
            del self._keys[number]
        self._freed.append(key)

    def _drop(self, key: int) -> None:
        one = self.find(key)
        self._mine.pop(key, None)
        self._theirs.pop(key, None)
        self._handles.discard(key)
        self._digests.pop(key, None)
        self._keys.pop(id(one), None)

    def _commit(self, packer: "packing.Packer", freed: int) -> None:
        del self._freed[:freed]
        self._held = list(packer.objects.values())
        self._digests.update(packer.digests)
        for key in packer.new:
            one = self._mine[key] = packer.objects[key]
            self._keys[id(one)] = key
        self._handles |= packer.handles


class Packed:
    """A message that is ready: `header` and `buffers`. Once it was sent, it is to be committed."""

    def __init__(
        self,
        exchange: Exchange,
        packer: "packing.Packer",
        header: dict[str, Any],
        buffers: list[memoryview],
    ) -> None:
        self.header, self.buffers = header, buffers
        freed = len(header["freed"])
        self.commit = lambda: exchange._commit(packer, freed)


def _watchable(one: Any) -> bool:
    try:
        weakref.ref(one)
    except TypeError:
        return False
    return True
