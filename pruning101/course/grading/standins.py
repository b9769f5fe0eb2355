"""Calls between the judge and the worker, which may nest, and what stands in for the objects of the
other side.
"""

import builtins
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .channel import Channel, ExchangeError
from .exchange import Exchange

TEXT = 500  # characters of an error's text
_FLOATS = {str(x): x for x in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


class StudentError(Exception):
    """An error of the student's own code that has no class of Python's."""


@dataclass(frozen=True)
class Told:
    """What the other side tells of an error: its class, its text, and where it arose, if known."""

    name: str
    text: str
    where: str


class Remote:
    """Stands in for an object of the other side. It compares by identity, and is of no other class
    whatever that object claims to be.
    """

    __slots__ = ("__weakref__", "_ask")

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self._ask("call", self, args, kwargs)

    def __iter__(self) -> Any:
        return self._ask("iter", self)

    def __next__(self) -> Any:
        return self._ask("next", self)

    def __getitem__(self, index: Any) -> Any:
        return self._ask("item", self, index)

    def __len__(self) -> int:
        return self._ask("len", self)

    def __bool__(self) -> bool:
        return self._ask("bool", self) is True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._ask("attribute", self, name)

    def __repr__(self) -> str:
        return "<an object of your own>"


@dataclass(frozen=True, eq=False)
class Graph:
    """What autograd needs to go back from a call's results to its arguments."""

    outputs: list[Tensor]
    inputs: list[Tensor]

    def backward(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the inputs, from those of the outputs."""
        pairs = zip(self.outputs, gradients, strict=True)
        used = [(one, gradient) for one, gradient in pairs if gradient is not None]
        if not used or not self.inputs:
            return [None] * len(self.inputs)
        outputs, given = zip(*used, strict=True)
        found = torch.autograd.grad(
            outputs, self.inputs, given, allow_unused=True, retain_graph=True
        )
        return list(found)


class _Answer(torch.autograd.Function):
    """Gives a call's results a gradient function, which asks the side that computed them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, peer: "Peer", graph: Any, outputs: list[Tensor], anchor: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.peer, ctx.graph, ctx.count = peer, graph, len(inputs)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        found = ctx.peer.request("backward", ctx.graph, list(gradients))
        if type(found) is not list or len(found) != ctx.count:
            raise ExchangeError("What came back is not a gradient for each argument.")
        return (None, None, None, None, *found)


class Disconnected(BaseException):
    """Nothing more can be asked of the other side: `reason` is TimeoutError (it took too long),
    EOFError or OSError (it is gone) or ExchangeError (it cannot be understood).

    No Exception, so that no check that expects errors takes it for one.
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Peer:
    """One end of the conversation: asks the other side, and meanwhile does what that side asks.

    `actions` are what the other side may ask for, beside the use of handles. Of an error that such
    an action raises, `tell` makes what the other side is told; errors not of the class `told` are
    not for the other side. A side that `follows` the other believes it, and has torch's default
    generator set by it; one that does not guards itself.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        actions: dict[str, Callable[..., Any]],
        tell: Callable[[BaseException], Told],
        told: type[BaseException] = Exception,
        follows: bool = False,
    ) -> None:
        self.channel = channel
        self.exchange = Exchange(lambda: Remote(self.request), guards=not follows)
        used: dict[str, Callable[..., Any]] = {"call": _call, "iter": iter, "next": next}
        used |= {"bool": bool, "backward": Graph.backward}
        self._actions = {name: self._on_handle(action) for name, action in used.items()} | actions
        self._tell = tell
        self._told = told
        self._depth = 0  # of calls within calls
        self._thread = threading.get_ident()
        self._follows = follows
        self._random = b""  # the state of torch's default generator at the last exchange
        self._raised: list[BaseException] = []  # here, in the call under way
        self.lost: Exception | None = None  # why nothing more can be asked

    def request(self, action: str, *parts: Any) -> Any:
        """What the other side answers; raises the error that it raised, or Disconnected."""
        if threading.get_ident() != self._thread:
            raise RuntimeError("This can be used in the main thread only.")
        if self.lost is not None:
            raise Disconnected(self.lost)
        self._send({"action": action, "modes": _modes()}, parts)
        self._depth += 1
        while True:
            header, value, graph = self._receive()
            if "action" not in header:
                break
            self._serve(header, value)
        error = self._error(header["raised"]) if "raised" in header else None
        self._end_call()
        if not self._follows:
            # So that a seed which is set again is told from a state that nobody has touched.
            torch.rand(())
            self._random = torch.get_rng_state().numpy().tobytes()
        if error is not None:
            raise error
        if graph is not None:
            self._attach(*graph)
        return value

    def serve(self) -> None:
        """Do what the other side asks for next; raises Disconnected."""
        header, value, _ = self._receive()
        self._serve(header, value)

    def close(self) -> None:
        """Hang up: whoever asks for anything more gets Disconnected."""
        self.lost = self.lost or EOFError("The other side was left.")
        self.channel.close()

    def _serve(self, header: dict[str, Any], parts: Any) -> None:
        self._depth += 1
        try:
            action = self._actions.get(header["action"])
            if action is None:
                raise TypeError("This object can be called and iterated over, no more.")
            with _in_modes(header["modes"]):
                answer = action(*parts)
            self._send({}, answer, Graph)
        except Disconnected:
            raise
        except self._told as error:
            self._send({"raised": self._report(error)}, None)
        del parts
        self._end_call()

    def _disconnected(self, reason: Exception) -> Disconnected:
        self.lost = reason
        return Disconnected(reason)

    def _end_call(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.exchange.end_call()
            self._raised.clear()

    def _on_handle(self, action: Callable[..., Any]) -> Callable[..., Any]:
        return lambda one, *parts: action(self.exchange.handed_out(one), *parts)

    def _send(self, header: dict[str, Any], value: Any, graph: Any = None) -> None:
        random = b"" if self._follows else torch.get_rng_state().numpy().tobytes()
        if random != self._random:
            header["random"] = random.hex()
        packed = self.exchange.pack(value, graph)
        try:
            self.channel.send({**header, **packed.header}, packed.buffers)
        except OSError as error:
            raise self._disconnected(error) from None
        packed.commit()
        self._random = random

    def _receive(self) -> tuple[dict[str, Any], Any, Any]:
        try:
            header, buffers = self.channel.receive()
            value, graph = self.exchange.unpack(header, buffers)
            # The judge takes none: in a state of zeros all that a check draws would be alike.
            if self._follows and "random" in header:
                state = bytearray.fromhex(header["random"])
                torch.set_rng_state(torch.frombuffer(state, dtype=torch.uint8))
        except (OSError, EOFError, ExchangeError) as error:
            raise self._disconnected(error) from None
        except (MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise self._disconnected(ExchangeError(str(error)[:TEXT])) from None
        return header, value, graph

    def _attach(self, graph: Any, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                anchor = torch.zeros((), requires_grad=True)  # where no argument takes part
                _Answer.apply(self, graph, outputs, anchor, *inputs)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise self._disconnected(ExchangeError(str(error)[:TEXT])) from None

    def _report(self, error: BaseException) -> dict[str, Any]:
        """What the other side is told of an error; of one of its own, only which one it is."""
        if (back := getattr(error, "_origin", None)) is not None:
            return {"back": back}
        self._raised.append(error)
        told = self._tell(error)
        return {
            "name": told.name,
            "text": told.text,
            "where": told.where,
            "origin": len(self._raised) - 1,
        }

    def _error(self, report: Any) -> BaseException:
        """The error that the other side reports."""
        try:
            if "back" in report:
                return self._raised[report["back"]]
            told = Told(*(one_line(report[part]) for part in ("name", "text", "where")))
            origin = int(report["origin"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise self._disconnected(
                ExchangeError("An error is reported without its name.")
            ) from None
        kind = getattr(builtins, told.name, None)
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            kind = StudentError
        try:
            error = kind(told.text)
        except TypeError:  # one that takes more than a text
            error = StudentError(told.text)
        error._origin, error.told = origin, told  # type: ignore[attr-defined]
        return error


def one_line(text: str) -> str:
    """`text` cut to a length that can be read, without line ends and control characters."""
    if len(text) > TEXT:
        text = text[: TEXT - 4] + " ..."
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _call(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _modes() -> dict[str, Any]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": str(torch.get_default_dtype()),
    }


@contextlib.contextmanager
def _in_modes(modes: dict[str, Any]) -> Iterator[None]:
    """torch's modes as the other side has them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(_FLOATS[modes["dtype"]])
    try:
        with (
            torch.inference_mode(modes["inference"] is True),
            torch.set_grad_enabled(modes["grad"] is True),
        ):
            yield
    finally:
        torch.set_default_dtype(before)
