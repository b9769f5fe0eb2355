"""What is plain data, and may be copied from one process to another: the types, and the classes and
functions of known libraries by name.
"""

import dataclasses
import importlib
import inspect
import re
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from .channel import ExchangeError

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"),
        *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    )
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONTAINERS = {
    kind.__name__: kind
    for kind in (list, set, deque, dict, OrderedDict, Counter, defaultdict)  # type: ignore[attr-defined]
}
BIT_GENERATORS = {
    kind.__name__: kind
    # Not those whose state holds a position in a buffer: NumPy reads there without looking.
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.SFC64)
}
ARRAYS = re.compile(r"[<>=|]([biufc][1248]|c16|f16|c32|[US]\d{1,6})")
# Where a class may come from whose instances are plain data.
_LIBRARIES = (
    *("torch.nn.modules", "torch.nn.utils.prune", "pruning101"),
    *("torchvision.models", "torchvision.ops", "timm.models", "timm.layers"),
)
_CLOSED = ("pruning101.course", "pruning101.__main__")
_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range),
    *(torch.Size, torch.dtype, torch.device),
)
_BASE: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    tuple: lambda one: tuple(tuple.__iter__(one)),
}
_HELD = {"_modules": nn.Module, "_parameters": Tensor, "_buffers": Tensor}  # and of which class


def is_plain(one: Any) -> bool:
    """Whether an object goes over as a copy; else as a handle."""
    kind = type(one)
    if kind in (Tensor, nn.Parameter):
        on_cpu = one.device.type == "cpu" and one.layout is torch.strided
        return on_cpu and not one.is_quantized and one.dtype in DTYPE_NAMES
    if kind is np.ndarray:
        return ARRAYS.fullmatch(one.dtype.str) is not None
    if kind is torch.Generator:
        return one.device.type == "cpu"
    if kind is np.random.Generator:
        return type(one.bit_generator) in BIT_GENERATORS.values()
    if kind in CONTAINERS.values():
        return True
    return not isinstance(one, type) and known_class(kind)


def as_base(one: Any) -> Any:
    """A number, text or tuple of a class of one's own as Python's, without any of its methods."""
    if isinstance(one, bool | np.generic | torch.Size) or type(one) in _BASE:
        return one
    if type(one).__module__ == "torch.return_types":
        return one
    made = (make(one) for base, make in _BASE.items() if isinstance(one, base))
    return next(made, one)


def is_scalar(one: Any) -> bool:
    """Whether it is one of NumPy's own numbers or texts."""
    return isinstance(one, np.generic) and (
        type(one) is one.dtype.type and ARRAYS.fullmatch(one.dtype.str) is not None
    )


def known_class(kind: type) -> bool:
    """Whether a class is a module, a pruning method or a dataclass of the known libraries, and so
    are the classes that it is made from.
    """
    data = issubclass(kind, nn.Module | prune.BasePruningMethod) or dataclasses.is_dataclass(kind)
    return (
        data
        and kind.__dictoffset__ != 0
        and all(
            base.__module__ in ("builtins", "abc", "typing")
            or _at(base.__module__, base.__qualname__) is base
            for base in kind.__mro__
        )
    )


def check_inert(objects: Iterable[Any], known: Callable[[Any], bool]) -> None:
    """Refuse objects, or what they hold, that could do anything but compute.

    The methods of modules call what lies under the names of their attributes. So no attribute may
    stand where the class has a method, submodules must be modules, and all the rest must be data,
    layers' classes or functions on tensors. `known` says of what is neither whether it may be
    there. Raises ExchangeError.
    """
    todo = list(objects)
    seen: dict[int, Any] = {}  # with the objects, so that no id is given twice
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, dict):
            todo += [*one, *one.values()]
        elif isinstance(one, list | tuple | set | frozenset | deque):
            todo += one
        elif isinstance(one, slice):
            todo += [one.start, one.stop, one.step]
        elif known_class(type(one)):
            _check_attributes(one)
            todo += vars(one).values()
        elif not (_is_data(one) or known(one)):
            raise ExchangeError(
                f"a module or a record holds a {type(one).__name__}, which is no plain data"
            )


def is_layer(one: Any) -> bool:
    """Whether it is the class of one of torch's own layers: all that making one does is compute."""
    return (
        isinstance(one, type)
        and f"{one.__module__}.".startswith("torch.nn.modules.")
        and known_class(one)
    )


def _is_data(one: Any) -> bool:
    if isinstance(one, type):
        return is_layer(one)
    return type(one) in _ATOMS or is_scalar(one) or is_plain(one) or place_of(one) is not None


def _check_attributes(one: Any) -> None:
    for name in vars(one):
        there = inspect.getattr_static(type(one), name, None)
        if callable(there) or hasattr(type(there), "__get__"):
            raise ExchangeError(f"a {type(one).__name__} has something in its method's place")
    if isinstance(one, nn.Module):
        _check_names(one)
        for holder, kind in _HELD.items():
            held = vars(one).get(holder, {}).values()
            if not all(part is None or isinstance(part, kind) for part in held):
                raise ExchangeError(f"a module has something in its {holder} that does not belong")


def _check_names(module: nn.Module) -> None:
    """Refuse a module that holds something under a name which could be read as code: torch.fx
    writes the names of what it traces into a program, quoted, and runs that.
    """
    names = list(vars(module))
    for holder in _HELD:
        held = vars(module).get(holder, {})
        if type(held) not in (dict, OrderedDict):
            raise ExchangeError(f"a module's {holder} is no dict")
        names += held
    if not all(type(name) is str and name.isprintable() for name in names):
        raise ExchangeError("a module holds something under a name that is no text")
    if any(mark in name for name in names for mark in "\"'\\"):
        raise ExchangeError("a module holds something under a name with a quotation mark in it")
    # torch and NumPy ask any object for these, and a module answers with what it holds.
    if any(name.startswith("__") for name in names):
        raise ExchangeError("a module holds something under one of Python's own names")


def _at(module: str, name: str) -> Any:
    """What lies under `name` in a module of the known libraries; None where it is another module,
    or nothing lies there.
    """
    inside = any(f"{module}.".startswith(f"{library}.") for library in _LIBRARIES)
    if not inside or any(f"{module}.".startswith(f"{closed}.") for closed in _CLOSED):
        return None
    try:
        return vars(importlib.import_module(module)).get(name)
    except ImportError:
        return None


def class_named(module: str, name: str) -> type:
    """A class of the known libraries whose instances are plain data; raises ExchangeError."""
    found = _at(module, name)
    if not isinstance(found, type) or not known_class(found):
        raise ExchangeError(f"{module}.{name} is no class whose objects can be handed over"[:200])
    return found


def function_named(place: str, name: str) -> Any:
    """A function of torch.nn.functional, or of torch where tensors have a method of that name;
    None where there is no such function.
    """
    module = {"functional": functional, "torch": torch}[place]
    found = getattr(module, name, None)
    builtin = isinstance(found, types.BuiltinFunctionType)
    if name.startswith("_") or not (builtin or isinstance(found, types.FunctionType)):
        return None
    if place == "torch":
        return found if builtin and hasattr(Tensor, name) else None
    ours = getattr(found, "__module__", None) in ("torch.nn.functional", "torch._C._nn")
    return found if ours or function_named("torch", name) is found else None


def place_of(one: Any) -> str | None:
    """Where `function_named` finds a function under its own name; None for anything else."""
    if not isinstance(one, types.BuiltinFunctionType | types.FunctionType):
        return None
    places = ("functional", "torch")
    return next((place for place in places if function_named(place, one.__name__) is one), None)


def return_type(name: str) -> Any:
    """A named tuple of torch's, such as that of `torch.max`; None where there is none."""
    found = getattr(torch.return_types, name, None)
    return found if isinstance(found, type) and issubclass(found, tuple) else None
