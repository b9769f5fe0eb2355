"""Python values as JSON and buffers, and back, without ever running anything of the sender's.

Plain data are numbers, texts, containers, tensors, arrays, random generators, and modules and
dataclasses of known libraries. Types are taken exactly: an object of a subclass that the sender
made is no plain data, so that no method of its own is ever met on the other side.

A value is written as a node: itself, where JSON has it, else a list that begins with its kind.
What has an identity (it may change, or be met twice) is written as its key, and described once
beside the value; so cycles and any depth of lists in lists are no matter.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import kinds
from .channel import ExchangeError

if TYPE_CHECKING:
    from .exchange import Exchange

DEPTH = 100  # of tuples in tuples
ELEMENTS = 2**22  # of a tensor, beyond those sent: stride 0 makes any number from a single byte
# What Python and torch raise where a message does not fit.
BROKEN = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)


class Packer:
    """Writes values for the other side of `exchange`, which learns of it when that commits."""

    def __init__(self, exchange: "Exchange") -> None:
        self._exchange = exchange
        self._numbers: dict[int, int] = {}  # keys of new objects by id
        self._described: dict[int, tuple[list, Any]] = {}  # what is written, and its memory
        self._todo: list[int] = []
        self.objects: dict[int, Any] = {}
        self.new: list[int] = []
        self.handles: set[int] = set()
        self.digests: dict[int, bytes] = {}

    def node(self, value: Any, depth: int = 0) -> Any:
        """`value` as a node; what it holds is described later."""
        if depth > DEPTH:
            raise ExchangeError(f"nested more than {DEPTH} deep")
        if not self._exchange.guards:
            value = kinds.as_base(value)
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind in (tuple, frozenset, slice):
            parts = (value.start, value.stop, value.step) if kind is slice else value
            return [kind.__name__, *(self.node(part, depth + 1) for part in parts)]
        if kind in (torch.Size, range):
            parts = (value.start, value.stop, value.step) if kind is range else value
            return [kind.__name__, *parts]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind is torch.dtype and value in kinds.DTYPE_NAMES:
            return ["dtype", kinds.DTYPE_NAMES[value]]
        if kind is torch.device:
            return ["device", str(value)]
        if kinds.is_scalar(value):
            return ["scalar", value.dtype.str, value.tobytes().hex()]
        if kind.__module__ == "torch.return_types" and kinds.return_type(kind.__name__) is kind:
            return ["returned", kind.__name__, *(self.node(part, depth + 1) for part in value)]
        named = kinds.known_class if self._exchange.guards else kinds.is_layer
        if isinstance(value, type) and named(value):
            return ["class", value.__module__, value.__qualname__]
        if (place := kinds.place_of(value)) is not None:
            return ["function", place, value.__name__]
        known = self._exchange.key(value)
        key = self._numbers.get(id(value)) if known is None else known
        if key is None:
            key = self._exchange.new_key()
            self._numbers[id(value)] = key
            self.new.append(key)
        if key not in self.objects:
            self.objects[key] = value
            self._todo.append(key)
            if known is None and not self._exchange.copies(value):
                self.handles.add(key)
        return ["is", key]

    def describe(self) -> None:
        """Describe all objects met so far, and those that they hold."""
        while self._todo:
            key = self._todo.pop()
            one = self.objects[key]
            if (
                key not in self.handles
                and not self._exchange.is_handle(key)
                and kinds.is_plain(one)
            ):
                self._described[key] = self._description(one)

    def computed(self) -> list[Tensor]:
        """The tensors among the new objects that have a gradient function."""
        found = (self.objects[key] for key in self.new)
        return [one for one in found if isinstance(one, Tensor) and one.grad_fn is not None]

    def changes(self) -> tuple[list, list[memoryview]]:
        """What to write of the objects that the other side does not know as they are now."""
        seen: dict[Any, bytes] = {}
        for key, (written, memory) in self._described.items():
            digest = hashlib.blake2b(json.dumps(written).encode())
            if memory is not None:
                place = _place(memory)
                if place not in seen:
                    seen[place] = hashlib.blake2b(_bytes(memory)).digest()
                digest.update(seen[place])
            self.digests[key] = digest.digest()
        changed = {k for k, d in self.digests.items() if d != self._exchange.digest(k)}
        places = {
            _place(m) for k, (_, m) in self._described.items() if k in changed and m is not None
        }
        objects: list[list] = []
        buffers: list[memoryview] = []
        indices: dict[Any, int] = {}
        for key, (written, memory) in self._described.items():
            # Who shares memory with a changed tensor is written, too: so it stays shared.
            place = None if memory is None else _place(memory)
            if key not in changed and place not in places:
                continue
            if place is not None and place not in indices:
                indices[place] = len(buffers)
                buffers.append(_bytes(memory))
            objects.append([key, indices.get(place, -1), *written])
        objects += [[key, -1, "handle"] for key in self.handles]
        return objects, buffers

    def _description(self, one: Any) -> tuple[list, Any]:
        """An object's kind and content, and the memory that goes as a buffer."""
        kind = type(one)
        if kind in (list, set, deque):
            return [kind.__name__, *map(self.node, one)], None
        if kind in kinds.CONTAINERS.values():
            parts = [part for item in one.items() for part in item]
            return [kind.__name__, *map(self.node, parts)], None
        if kind in (Tensor, nn.Parameter):
            plain = one.detach().resolve_conj().resolve_neg()
            gradient = one.grad if one.is_leaf else None
            where = [list(plain.shape), list(plain.stride()), plain.storage_offset()]
            content = [kinds.DTYPE_NAMES[one.dtype], *where, one.requires_grad]
            return [kind.__name__, *content, self.node(gradient)], plain.untyped_storage()
        if kind is np.ndarray:
            return ["array", one.dtype.str, list(one.shape)], np.ascontiguousarray(one)
        if kind is torch.Generator:
            return ["torch generator", one.get_state().numpy().tobytes().hex()], None
        if kind is np.random.Generator:
            bits = one.bit_generator
            return ["numpy generator", type(bits).__name__, _as_text(bits.state)], None
        parts = [part for item in vars(one).items() for part in item]
        return ["object", kind.__module__, kind.__qualname__, *map(self.node, parts)], None


class Unpacker:
    """Makes the objects of a message, or changes those that are here already."""

    def __init__(self, exchange: "Exchange", objects: list, buffers: list[memoryview]) -> None:
        self._exchange = exchange
        self._buffers = buffers
        self._made: dict[int, Any] = {}
        # By buffer, and whether it holds truth values: these share their memory with nothing else,
        # for a byte other than 0 and 1 is both true and false to torch.
        self._storages: dict[tuple[int, bool], torch.UntypedStorage] = {}
        self._reuse(objects)
        for key, index, kind, *content in objects:
            self._made[-key] = self._shell(-key, index, kind, content)
        # Objects before what may hold them as keys, so that they can be hashed.
        hashing = ("set", "dict", "OrderedDict", "Counter", "defaultdict")
        for key, _, kind, *content in sorted(objects, key=lambda one: one[2] in hashing):
            self._fill(self._made[-key], kind, content)

    def value(self, node: Any, depth: int = 0) -> Any:
        """The value of a node."""
        if depth > DEPTH:
            raise ExchangeError(f"nested more than {DEPTH} deep")
        if not isinstance(node, list):
            if isinstance(node, dict):
                raise ExchangeError("a dict is no node")
            return node
        kind, *parts = node
        if kind == "is":
            (key,) = parts
            return self._one(-key)
        if kind in ("tuple", "frozenset", "slice"):
            values = [self.value(part, depth + 1) for part in parts]
            made: dict[str, Any] = {"tuple": tuple, "frozenset": frozenset}
            return slice(*values) if kind == "slice" else made[kind](values)
        if kind == "Size":
            return torch.Size(parts)
        if kind == "range":
            return range(*parts)
        if kind == "complex":
            return complex(*parts)
        if kind == "bytes":
            return bytes.fromhex(*parts)
        if kind == "dtype":
            return kinds.DTYPES[parts[0]]
        if kind == "device":
            return torch.device(parts[0])
        if kind == "scalar":
            return _array(parts[0], [], memoryview(bytes.fromhex(parts[1])))[()]
        if kind == "returned":
            made_of = [self.value(part, depth + 1) for part in parts[1:]]
            return kinds.return_type(parts[0])(made_of)
        if kind == "class":
            found = kinds.class_named(*parts)
            if self._exchange.guards and not kinds.is_layer(found):
                raise ExchangeError("a class is none of torch's layers")
            return found
        if kind == "function" and (found := kinds.function_named(*parts)) is not None:
            return found
        raise ExchangeError(f"{str(kind)[:40]!r} is no kind of value")

    def _one(self, key: int) -> Any:
        one = self._made.get(key)
        one = self._exchange.find(key) if one is None else one
        if one is None:
            raise ExchangeError("an object is named, but not described")
        return one

    def _shell(self, key: int, index: int, kind: str, content: list) -> Any:
        """The object of a key, made where it is not there yet; all of it but what holds others."""
        there = self._exchange.find(key)
        one: Any
        made: Any
        if kind == "handle":
            return self._exchange.stand_in(key)
        if kind in ("Tensor", "Parameter"):
            one = self._tensor(there, index, kind, content)
        elif kind == "array":
            dtype, shape = content
            one = _array(dtype, shape, self._buffers[index])
            if there is not None:
                _same_type(there, np.ndarray)
                if there.shape != one.shape or there.dtype != one.dtype:
                    raise ExchangeError("an array changed its shape in place")
                if there.tobytes() != one.tobytes():
                    there[...] = one
                one = there
        elif kind == "torch generator":
            one = torch.Generator() if there is None else _same_type(there, torch.Generator)
            one.set_state(torch.frombuffer(bytearray.fromhex(content[0]), dtype=torch.uint8))
        elif kind == "numpy generator":
            made = kinds.BIT_GENERATORS[content[0]]
            one = np.random.Generator(made(0)) if there is None else there
            _same_type(_same_type(one, np.random.Generator).bit_generator, made)
        elif kind == "object":
            made = kinds.class_named(*content[:2])
            one = object.__new__(made) if there is None else _same_type(there, made)
        else:
            made = kinds.CONTAINERS[kind]
            one = made() if there is None else _same_type(there, made)
        return self._exchange.adopt(key, one) if there is None else one

    def _fill(self, one: Any, kind: str, content: list) -> None:
        if kind in ("Tensor", "Parameter"):
            gradient = self.value(content[-1])
            if one.is_leaf and one.grad is not gradient:
                one.grad = gradient
        elif kind == "numpy generator":
            one.bit_generator.state = _from_text(content[1])
        elif kind == "object":
            pairs = dict(self._pairs(content[2:]))
            # Python looks up some of its own on the object, __reduce_ex__ among them for a copy.
            if not all(type(name) is str and not name.startswith("__") for name in pairs):
                raise ExchangeError("an attribute's name is no text, or one of Python's own")
            vars(one).clear()
            vars(one).update(pairs)
        elif kind == "list":
            one[:] = [self.value(part) for part in content]
        elif kind in ("set", "deque"):
            values = [self.value(part) for part in content]
            one.clear()
            (one.update if kind == "set" else one.extend)(values)
        elif kind in kinds.CONTAINERS:
            items = list(self._pairs(content))
            one.clear()
            for name, value in items:
                one[name] = value

    def _pairs(self, content: list) -> Iterator[tuple[Any, Any]]:
        values = [self.value(part) for part in content]
        return zip(values[::2], values[1::2], strict=True)

    def _reuse(self, objects: list) -> None:
        """Put the memory of each buffer where the tensors lie that are here already."""
        taken = set()
        for key, index, kind, *content in objects:
            there = self._exchange.find(-key) if kind in ("Tensor", "Parameter") else None
            if not isinstance(there, Tensor) or kinds.DTYPES.get(content[0]) is not there.dtype:
                continue
            storage, which = there.untyped_storage(), (index, there.dtype is torch.bool)
            same_size = storage.nbytes() == self._buffers[index].nbytes
            if same_size and which not in self._storages and storage.data_ptr() not in taken:
                taken.add(storage.data_ptr())
                self._storages[which] = storage
                self._write(which)

    def _write(self, which: tuple[int, bool]) -> None:
        """Put a buffer into its storage, which is left alone where it holds the same already."""
        index, truth = which
        if self._buffers[index].nbytes:
            new = torch.frombuffer(self._buffers[index], dtype=torch.uint8)
            new = new.clamp(max=1) if truth else new
            flat = _flat(self._storages[which])
            if not torch.equal(flat, new):
                flat.copy_(new)

    def _tensor(self, there: Any, index: int, kind: str, content: list) -> Tensor:
        name, shape, stride, offset, requires_grad, _ = content
        dtype = kinds.DTYPES[name]
        which = (index, dtype is torch.bool)
        if which not in self._storages:
            self._storages[which] = torch.UntypedStorage(self._buffers[index].nbytes)
            self._write(which)
        storage = self._storages[which]
        _check_layout(shape, stride, offset, storage.nbytes() // dtype.itemsize)
        made = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
        if there is None:
            if kind == "Parameter":
                return nn.Parameter(made, requires_grad=requires_grad)
            return made.requires_grad_(requires_grad)
        _same_type(there, {"Tensor": Tensor, "Parameter": nn.Parameter}[kind])
        same_memory = there.untyped_storage().data_ptr() == storage.data_ptr() and storage.nbytes()
        layout = (there.shape, there.stride(), there.storage_offset(), there.dtype)
        if not same_memory or layout != (made.shape, made.stride(), offset, dtype):
            there.data = made
        if there.is_leaf and there.requires_grad != requires_grad:
            there.requires_grad_(requires_grad)
        return there


def _same_type(one: Any, kind: type) -> Any:
    if type(one) is not kind:
        raise ExchangeError(f"a {type(one).__name__} cannot become a {kind.__name__}")
    return one


def _check_layout(shape: list, stride: list, offset: int, there: int) -> None:
    """Refuse a tensor that reaches beyond its memory, or is larger than any that is sent."""
    numbers = [*shape, *stride, offset]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ExchangeError("a tensor's layout is not given in whole numbers")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if count > max(ELEMENTS, there) or (count and last >= there) or offset > there:
        raise ExchangeError("a tensor reaches beyond its memory")


def _array(dtype: str, shape: list, buffer: memoryview) -> np.ndarray:
    found = np.frombuffer(buffer, _number_type(dtype)).reshape(shape).copy()
    if found.dtype == bool:
        found = found.view(np.uint8) != 0
    return found


def _as_text(state: dict[str, Any]) -> str:
    """The state of a NumPy generator as JSON."""
    return json.dumps(state, default=lambda part: {"array": part.tolist(), "of": part.dtype.str})


def _from_text(text: str) -> dict[str, Any]:
    def arrays(part: dict[str, Any]) -> Any:
        return np.array(part["array"], _number_type(part["of"])) if "array" in part else part

    return json.loads(text, object_hook=arrays)


def _number_type(dtype: str) -> np.dtype:
    if not kinds.ARRAYS.fullmatch(dtype):
        raise ExchangeError(f"{dtype[:40]!r} is no type of an array")
    return np.dtype(dtype)


def _place(memory: Any) -> Any:
    """What tells two memories apart."""
    if isinstance(memory, np.ndarray):
        return id(memory)
    return (memory.data_ptr(), memory.nbytes())


def _flat(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


def _bytes(memory: Any) -> memoryview:
    flat = memory if isinstance(memory, np.ndarray) else _flat(memory).numpy()
    return memoryview(flat.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
