"""What goes from one process to the other and comes back, and what messages are refused."""

import contextlib
import json
import math
import os
import socket
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from pruning101.core import masks, models
from pruning101.core.measure import Footprint
from pruning101.course.grading import channel as channels
from pruning101.course.grading.channel import Channel, ExchangeError
from pruning101.course.grading.exchange import Exchange
from pruning101.course.grading.standins import Disconnected, Peer, Remote, StudentError, Told


class Pair:
    """Two sides in one process, and messages between them as they are sent."""

    def __init__(self):
        self.here, self.there = (Exchange(lambda: Remote(None)) for _ in range(2))

    def over(self, value, *, back=False, graph=None):
        one, other = (self.there, self.here) if back else (self.here, self.there)
        packed = one.pack(value, graph)
        header = json.loads(json.dumps(packed.header))
        buffers = [memoryview(bytearray(buffer)) for buffer in packed.buffers]
        packed.commit()
        return other.unpack(header, buffers)[0]

    def sizes(self, value):
        """What the next message would describe."""
        return [kind for _, _, kind, *_ in self.here.pack(value).header["objects"]]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9)
    | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=4)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
    | st.frozensets(st.integers() | st.text())
    | st.sets(st.floats(allow_nan=False)),
    max_leaves=20,
)  # fmt: skip


def same(one, other):
    """Equal, of one type throughout, with dicts in one order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, complex):
        return repr(one) == repr(other)
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@settings(deadline=None)
@given(plain)
def test_plain_values_come_over_as_they_are(value):
    assert same(Pair().over(value), value)


@pytest.mark.parametrize(
    "value",
    [
        range(3, 9, 2),
        slice(None, 2.5, "x"),
        OrderedDict(b=1, a=[2]),
        Counter("abca"),
        deque([1, 2]),
        np.float64(0.1),
        np.bool_(True),
        np.str_("ä"),
        np.int16(-3),
        torch.Size([2, 3]),
        torch.float16,
        torch.device("cpu"),
        nn.Conv2d,
        torch.relu,
        functional.relu,
        functional.gelu,
        Footprint(1, 2, 3, 4, 5, 6),
        torch.max(torch.eye(2), 0).__class__((1, 2)),
    ],
    ids=lambda value: type(value).__name__,  # the repr of a function has its address
)
def test_other_values_come_over_as_they_are(value):
    assert same(Pair().over(value), value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(12)[2::3],
        torch.ones(2, 1).expand(2, 5),
        torch.tensor([True, False]),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.tensor([1 + 2j]).conj(),
        torch.empty(0, 3),
        torch.ones(3, requires_grad=True),
    ],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_a_tensor_keeps_its_layout(tensor):
    came = Pair().over(tensor)
    assert type(came) is torch.Tensor
    assert came.dtype == tensor.dtype
    assert came.stride() == tensor.stride()
    assert came.requires_grad == tensor.requires_grad
    assert torch.equal(came, tensor.detach())
    assert came.numel() == 0 or came.data_ptr() != tensor.data_ptr()


def test_views_and_shared_weights_stay_shared():
    base = torch.zeros(4)
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    (whole, part), twice = Pair().over(((base, base[2:]), model))
    whole[3] = 7
    assert part.tolist() == [0, 7]
    assert twice[0].weight is twice[1].weight
    assert twice[0] is twice[1]


def test_modules_come_over_with_hooks_of_known_classes():
    model = models.BasicBlock(2, 2, 1).eval()
    masks.apply(model, {"conv1.weight": torch.rand(2, 2, 3, 3) < 0.5})
    images = torch.rand(1, 2, 5, 5)
    came = Pair().over(model)
    assert torch.equal(came(images), model(images))
    assert not came.training
    assert masks.masks_of(came).keys() == masks.masks_of(model).keys()


@pytest.mark.parametrize("make", [torch.Generator, np.random.default_rng])
def test_generators_go_on_where_they_were(make):
    def draw(g):
        return g.random() if isinstance(g, np.random.Generator) else torch.rand((), generator=g)

    pair, generator = Pair(), make()
    draw(generator)
    came = pair.over(generator)
    drawn = draw(came)
    assert pair.over([came], back=True)[0] is generator
    second = draw(came)
    assert draw(generator) == second != drawn


class Always(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


class Layer(nn.Linear):
    pass


@pytest.mark.parametrize(
    "value",
    [
        *(Always(3), Layer(1, 1), lambda: 1, iter([1]), print, os.system, object(), Always),
        *(defaultdict, torch.load, np.array([None]), pytest, torch.ones(2).to_sparse()),
        *(type("T", (torch.Tensor,), {})([1.0]), type("D", (dict,), {})(), OrderedDict.fromkeys),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_comes_as_a_handle_and_comes_back_as_itself(value):
    pair = Pair()
    (came,) = pair.over([value])
    assert type(came) is Remote
    assert came != value
    assert pair.over((came, came), back=True) == (value, value)


def test_what_comes_back_is_what_was_sent_as_it_is_now():
    pair = Pair()
    model, numbers, array = nn.Linear(2, 2), [1, [2]], np.zeros(2)
    bias = model.bias
    came, numbers_there, array_there = pair.over((model, numbers, array))
    assert pair.over((came,), back=True)[0] is model
    with torch.no_grad():
        came.weight.fill_(3)
        came.bias.data = torch.full((2,), 4.0)
    came.eval()
    numbers_there[1].append(came.bias)
    array_there[1] = 5
    assert pair.over(None, back=True) is None
    assert model.weight.tolist() == [[3, 3], [3, 3]]
    assert model.bias is bias
    assert bias.tolist() == [4, 4]
    assert not model.training
    assert numbers == [1, [2, bias]]
    assert array.tolist() == [0, 5]


def test_memory_is_changed_in_place_and_shared_as_it_is_on_the_other_side():
    pair, base = Pair(), torch.zeros(4)
    part, one, other = base[1:], torch.zeros(2), torch.zeros(2)
    twin = one.view(2)
    place = part.data_ptr()
    part_there, one_there, twin_there, other_there = pair.over((part, one, twin, other))
    part_there.fill_(2)
    twin_there.data = torch.tensor([3.0, 4.0])
    other_there.data = one_there.data
    one_there[1] = 5
    pair.over(None, back=True)
    assert base.tolist() == [0, 2, 2, 2]
    assert (one.tolist(), twin.tolist(), other.tolist()) == ([0, 5], [3, 4], [0, 5])
    assert part.data_ptr() == place
    assert other.data_ptr() == one.data_ptr() != twin.data_ptr()


def test_only_what_has_changed_is_sent_again():
    pair = Pair()
    one, other = torch.zeros(2), torch.ones(2)
    there = pair.over((one, other))
    assert pair.sizes((one, other)) == []
    one[0] = 1
    assert pair.sizes(None) == ["Tensor"]
    assert pair.over(other) is there[1]
    assert there[0].tolist() == [1, 0]


def test_an_object_is_kept_as_long_as_the_other_side_has_it():
    pair = Pair()
    tensor = torch.ones(3)
    watch = weakref.ref(tensor)
    there = pair.over(tensor)
    pair.over(None, back=True)
    del tensor
    assert watch() is not None
    pair.over(there, back=True)
    del there
    assert watch() is not None, "the other side counts on it until it has spoken"
    pair.over(None)
    pair.over(None, back=True)
    assert watch() is None


def test_lists_are_kept_until_the_call_is_over():
    pair, numbers = Pair(), [1]
    there = pair.over(numbers)
    assert pair.over(there, back=True) is numbers
    pair.here.end_call()
    pair.there.end_call()
    assert pair.over(numbers) is not there


def test_what_is_too_deep_or_too_large_is_not_sent_and_nothing_is_lost(monkeypatch):
    deep = ()
    for _ in range(200):
        deep = (deep,)
    pair = Pair()
    with pytest.raises(ExchangeError, match="nested more than 100 deep"):
        pair.over((torch.ones(1), deep))
    assert pair.sizes(None) == []
    with pytest.raises(ExchangeError, match="handed over"):
        pair.over([10**5000])
    monkeypatch.setattr(channels, "MESSAGE_BYTES", 1000)
    ours, _theirs = socket.socketpair()
    with ours, _theirs:
        with pytest.raises(ExchangeError, match="too large"):
            Channel(ours).send({}, [memoryview(bytes(4000))])
        with pytest.raises(ExchangeError, match="handed over"):
            Channel(ours).send({"value": 10**5000}, [])


# --- hostile messages ----------------------------------------------------------------------------

LINEAR = ["torch.nn.modules.linear", "Linear"]
POSITION = json.dumps(  # what is read lies far behind the 624 numbers
    {
        "bit_generator": "MT19937",
        "state": {"key": {"array": [1] * 624, "of": "<u4"}, "pos": 10**6},
    }
)
T = ["Tensor", "float32", [2], [1], 0, False, None]


def hostile(value=None, objects=(), buffers=(b"12345678",), freed=(), **more):
    """What a side makes of a message, which holds the tensor 1 of its own and the list 2."""
    pair = Pair()
    pair.over((torch.zeros(2), [0]))
    header = {"value": value, "objects": list(objects), "freed": list(freed), **more}
    header = json.loads(json.dumps(header))
    return pair.here.unpack(header, [memoryview(bytearray(buffer)) for buffer in buffers])[0]


def test_the_message_that_the_hostile_ones_are_made_from_is_taken():
    assert torch.is_tensor(hostile(["is", 1], [[1, 0, *T]]))
    assert hostile(["is", -2]) == [0]


@pytest.mark.parametrize(
    ("value", "objects"),
    [
        (["is", 1], []),  # never described
        (["is", -3], []),  # never sent
        (["is", [1]], []),
        (["is"], []),
        ({"a": 1}, []),
        (["no such kind", 1], []),
        ([], []),
        ([[]], []),
        (["tuple", *[["is", 9]]], []),
        (["bytes", "xyz"], []),
        (["dtype", "__doc__"], []),
        (["device", "no such"], []),
        (["range", "1"], []),
        (["Size", "1"], []),
        (["scalar", "|O", "00" * 8], []),
        (["scalar", "<f8", "00"], []),
        (["returned", "__class__", 1], []),
        (["frozenset", ["is", -2]], []),
        (["function", "os", "system"], []),
        (["function", "torch", "load"], []),
        (["function", "torch", "from_file"], []),
        (["function", "functional", "importlib"], []),
        (["function", "functional", "boolean_dispatch"], []),
        (["function", "functional", "_verify_batch_size"], []),
        (["class", "builtins", "eval"], []),
        (["class", "os", "system"], []),
        (["class", "torch.nn.modules.linear", "Linear.__init__"], []),
        (["class", "torch.nn.modules.linear", "torch"], []),
        (["class", "torch.nn.modules.linear", ["Linear"]], []),
        (["class", "pruning101.course.grading.judge", "Outcome"], []),
        (["class", "pruning101.course.grading.sandbox", "Limits"], []),
        (["class", "pruning101.core.slopes", "Rewritten"], []),
        (["class", "torch.nn.modules.no_such_module", "Linear"], []),
        (None, [[1, -1, "object", "subprocess", "Popen"]]),
        (None, [[1, -1, "object", "torch.fx.graph_module", "GraphModule"]]),
        (None, [[1, -1, "object", "torch.nn.modules.linear", "Linear", "odd"]]),
        (None, [[1, -1, "object", "torch.nn.modules.linear", "Linear", 1, 2]]),
        (None, [[1, -1, "object", *LINEAR, "__reduce_ex__", 1]]),
        (None, [[1, -1, "object", *LINEAR, "_modules", ["is", -2]]]),
        (None, [[1, -1, "object", *LINEAR, "_modules", ["is", 2]], [2, -1, "dict", 'a"b', 1]]),
        (None, [[1, -1, "object", *LINEAR, "a\\b", 1]]),
        (None, [[1, -1, "no such kind"]]),
        (None, [[1, -1]]),
        (None, [1]),
        (None, {"1": 2}),
        (None, [["1", 0, *T]]),
        (None, [[1, 7, *T]]),
        (None, [[1, 0, "Tensor"]]),
        (None, [[1, 0, "Tensor", "float32", [3], [1], 0, False, None]]),
        (None, [[1, 0, "Tensor", "float32", [2], [-1], 1, False, None]]),
        (None, [[1, 0, "Tensor", "float32", [2**40, 2**40], [0, 0], 0, False, None]]),
        (None, [[1, 0, "Tensor", "float32", [2**20, 2**20], [0, 0], 0, False, None]]),
        (None, [[1, 0, "Tensor", "float32", [2], [2**62], 0, False, None]]),
        (None, [[1, 0, "Tensor", "float32", [2, 1], [1], 0, False, None]]),
        (None, [[1, 0, "Tensor", "float32", [True], [1], 0, False, None]]),
        (None, [[1, 0, "Tensor", "float32", [2], [1], 10**9, False, None]]),
        (None, [[1, 0, "Tensor", "int64", [1], [1], 0, True, None]]),
        (None, [[1, 0, "Tensor", "float32", [2], [1], 0, False, "gradient"]]),
        (None, [[-2, 0, *T]]),  # a tensor where a list was sent
        (None, [[-1, -1, "list"]]),
        (None, [[-9, 0, *T]]),
        (None, [[1, 0, "array", "<f8", [2]]]),
        (None, [[1, 0, "array", "|O", [1]]]),
        (None, [[1, 0, "array", "<f8,<f8", [1]]]),
        (None, [[1, -1, "torch generator", "00"]]),
        (None, [[1, -1, "numpy generator", "PCG64", "{}"]]),
        (None, [[1, -1, "numpy generator", "MT19937", POSITION]]),
        (None, [[1, -1, "numpy generator", "MT19937", "[1"]]),
        (None, [[1, -1, "dict", 1]]),
        (None, [[1, -1, "dict", ["is", 1], 1]]),
        (None, [[1, -1, "set", ["is", 1]]]),
    ],
    ids=str,
)
def test_a_malformed_message_is_refused(value, objects):
    with pytest.raises(ExchangeError):
        hostile(value, objects)


def test_a_message_cannot_free_what_is_not_its_own():
    for freed in ([1], [-9], ["1"], [None], [0]):
        with pytest.raises(ExchangeError):
            hostile(freed=freed)


@settings(deadline=None)
@given(st.data())
def test_a_garbled_message_is_refused_or_read(data):
    inner = st.none() | st.integers(-4, 9) | st.sampled_from(
        ["is", "tuple", "Tensor", "float32", "list", "object", "dict", "class", "array", "<f4"]
    )  # fmt: skip
    node = st.recursive(inner, lambda part: st.lists(part, max_size=7), max_leaves=12)
    with contextlib.suppress(ExchangeError):
        hostile(data.draw(node), data.draw(st.lists(st.lists(node, max_size=9), max_size=3)))


def test_a_byte_that_is_no_truth_value_does_not_count_twice():
    came = hostile(["is", 1], [[1, 0, "Tensor", "bool", [8], [1], 0, False, None]])
    assert came.view(torch.uint8).tolist() == [1] * 8
    both = [[1, 0, "Tensor", "bool", [8], [1], 0, False, None]]
    both += [[2, 0, "Tensor", "uint8", [8], [1], 0, False, None]]
    truth, count = hostile(["tuple", ["is", 1], ["is", 2]], both)
    assert truth.data_ptr() != count.data_ptr()
    pair = Pair()
    mine = torch.zeros(2, dtype=torch.bool)
    place, given = mine.data_ptr(), pair.over(mine)
    given.view(torch.uint8).fill_(2)
    assert pair.over(given, back=True) is mine
    assert mine.view(torch.uint8).tolist() == [1, 1]
    assert mine.data_ptr() == place
    came = hostile(["is", 1], [[1, 0, "array", "|b1", [8]]])
    assert came.view(np.uint8).tolist() == [1] * 8


def test_what_cannot_be_read_from_the_socket_is_refused():
    def received(data):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                theirs.sendall(data)
            return Channel(ours).receive()

    def framed(text, size=0):
        return len(text).to_bytes(8, "big") + size.to_bytes(8, "big") + text

    assert received(framed(b'{"sizes": [1]}', 1) + b"x") == ({}, [memoryview(b"x")])
    for broken in (b"", b"123", framed(b'{"sizes": [1]}', 1)):
        with pytest.raises(EOFError):
            received(broken)
    for text in (b"", b"{", b"[]", b"\xff", b"{}", b'{"sizes": [-1, 1]}', b'{"sizes": [true]}'):
        with pytest.raises(ExchangeError):
            received(framed(text))
    with pytest.raises(ExchangeError, match="nested too deeply"):
        received(framed(b"[" * 10**5))
    for lengths in ((2**63, 0), (2, 2**63)):
        with pytest.raises(ExchangeError, match="too large"):
            received(b"".join(n.to_bytes(8, "big") for n in lengths))


def in_place_of_a_method():
    layer = nn.Conv2d(1, 1, 1)
    layer.__dict__["_conv_forward"] = nn.Identity()
    return layer


def holding(holder, what):
    layer = nn.Sequential(nn.ReLU())
    vars(layer)[holder]["0"] = what
    return layer


def named(name):
    return nn.Sequential(OrderedDict({"0": nn.ReLU(), name: nn.ReLU()}))


def with_attribute(what):
    layer = nn.Linear(2, 2)
    layer.extra = {"deep": [(what,)]}
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    "make",
    [
        in_place_of_a_method,
        partial(holding, "_modules", lambda x: x),
        partial(holding, "_modules", nn.ReLU),
        partial(holding, "_modules", torch.relu),
        partial(holding, "_forward_hooks", lambda *_: None),
        partial(holding, "_parameters", [1.0]),
        partial(named, "__torch_function__"),
        partial(named, "__array_interface__"),
        partial(with_attribute, lambda: None),
        partial(with_attribute, models.BasicBlock),
        partial(with_attribute, Pair()),
    ],
    ids=range(11),
)
def test_a_module_that_could_do_more_than_compute_is_refused(make):
    with pytest.raises(ExchangeError):
        Pair().over([make()])
    pair = Pair()
    pair.here = Exchange(lambda: Remote(None), guards=False)  # an honest worker
    (found,) = pair.over([make()])
    assert type(found) is Remote


def test_a_module_that_came_over_cannot_be_changed_into_one_that_does_more():
    pair = Pair()
    model = nn.Sequential(nn.ReLU())
    there = pair.over(model)
    vars(model)["_modules"]["0"] = lambda x: x
    with pytest.raises(ExchangeError, match="does not belong"):
        pair.over(None)
    assert type(there) is nn.Sequential


def test_layers_with_functions_and_classes_of_layers_come_over():
    model = with_attribute(functional.relu)
    model.norm = nn.BatchNorm2d
    pair = Pair()
    pair.here = Exchange(lambda: Remote(None), guards=False)
    found = pair.over(model)
    assert found.norm is nn.BatchNorm2d
    assert found[0].extra["deep"][0][0] is functional.relu


# --- calls between two sides ---------------------------------------------------------------------


@pytest.fixture
def far():
    """A function that puts a function on the other side, and returns what stands for it here."""
    ours, theirs = socket.socketpair()
    functions = []

    def tell(error):
        return Told(type(error).__name__, str(error), "")

    def serve():
        peer = Peer(
            Channel(theirs),
            actions={"get": functions.pop, "len": len, "attribute": getattr},
            tell=tell,
            told=BaseException,
        )
        with contextlib.suppress(Disconnected), theirs:
            while True:
                peer.serve()

    thread = threading.Thread(target=serve)
    thread.start()
    peer = Peer(Channel(ours), actions={}, tell=lambda error: Told(type(error).__name__, "", ""))

    def put(function):
        functions.append(function)
        return peer.request("get")

    put.peer = peer
    yield put
    ours.shutdown(socket.SHUT_RDWR)
    thread.join()
    ours.close()


def test_calls_nest(far):
    def count(function, n):
        return 0 if n == 0 else 1 + function(function, n - 1)

    there = far(count)
    asked = []

    def here(_, n):
        asked.append(n)
        return there(here, n)

    assert there(here, 4) == 4
    assert asked == [3, 2, 1, 0]
    assert list(far(lambda numbers: [2 * n for n in numbers])(iter(range(3)))) == [0, 2, 4]


def test_a_stand_in_compares_by_identity_and_shows_public_attributes_only(far):
    class Mine:
        size, _hidden = 3, 4

        def __eq__(self, other):
            return True

        def __len__(self):
            return 2

    make = far(Mine)
    mine = make()
    assert type(mine) is Remote
    assert mine != 1
    assert mine == mine
    assert len(mine) == mine.size - 1 == 2
    assert not hasattr(mine, "_hidden")
    assert far(lambda given: given)(mine) is mine
    with pytest.raises(TypeError, match="called and iterated"):
        far(lambda given: given.size)(Mine())


def test_errors_keep_their_class_where_it_is_pythons(far):
    class Own(Exception):
        pass

    def fail(error):
        raise {"value": ValueError("no"), "own": Own("mine"), "exit": SystemExit(3)}[error]

    with pytest.raises(ValueError, match=r"^no$"):
        far(fail)("value")
    with pytest.raises(StudentError, match="mine"):
        far(fail)("own")
    with pytest.raises(StudentError):
        far(fail)("exit")
    with pytest.raises(KeyError):
        far(fail)("nothing")
    with pytest.raises(ValueError, match=r"^x{490,} [.]{3}$"):
        far(lambda: (_ for _ in ()).throw(ValueError("x" * 10**6)))()
    assert far(lambda: 3)() == 3


def test_an_error_of_a_callback_comes_back_as_itself_and_without_its_text(far):
    seen = []

    def watch(function):
        try:
            function()
        except AssertionError as error:
            seen.append(str(error))
            raise

    error = AssertionError("secret")

    def fail():
        raise error

    with pytest.raises(AssertionError) as caught:
        far(watch)(fail)
    assert caught.value is error
    assert seen == [""]


def test_gradients_go_through_a_call(far):
    layer, x = nn.Linear(3, 2), torch.rand(4, 3, requires_grad=True)

    def loss(layer, x):
        return {"loss": (layer(x) ** 2).sum(), "x": x, "new": nn.Linear(2, 2).weight}

    given = [x, *layer.parameters()]
    expected = torch.autograd.grad(loss(layer, x)["loss"], given)
    came = far(loss)(layer, x)
    assert came["x"] is x
    assert came["new"].is_leaf
    assert not came["loss"].is_leaf
    found = torch.autograd.grad(2 * came["loss"], given)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, 2 * other)
    with torch.no_grad():
        assert not far(loss)(layer, x)["loss"].requires_grad
    again = far(lambda y: 3 * y)(x * 2)
    assert torch.autograd.grad(again.sum(), x)[0].unique().tolist() == [6]


def test_modes_and_the_random_state_go_along(far):
    modes = far(lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    assert modes() == (True, False)
    with torch.no_grad():
        assert modes() == (False, False)
    with torch.inference_mode():
        assert modes() == (False, True)
    torch.set_default_dtype(torch.float64)
    try:
        assert far(lambda: torch.ones(1))().dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_only_handles_can_be_used_from_the_other_side(far):
    model = nn.Linear(1, 1)
    far(lambda *_: None)(model)

    def use(given):
        given_to = given.__class__  # a copy, so no request comes; ask for it as a hostile one would
        return given_to.__name__

    assert far(use)(model) == "Linear"
    with pytest.raises(ExchangeError, match="no handle"):
        far.peer.exchange.handed_out(model)
    with pytest.raises(ExchangeError, match="no handle"):
        far.peer.exchange.handed_out(print)


def test_a_side_that_is_gone_or_talks_nonsense_cannot_be_taken_for_an_error_of_a_check():
    for data in (b"", b"\0" * 15 + b"\1", b"\0" * 7 + b"\2" + b"\0" * 8 + b"{}"):
        ours, theirs = socket.socketpair()
        peer = Peer(Channel(ours), actions={}, tell=lambda error: Told("", "", ""))
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(Disconnected) as caught:
            peer.request("anything")
        assert not isinstance(caught.value, Exception)
        assert peer.lost is caught.value.reason
        ours.close()
        theirs.close()


def test_a_wait_ends_at_the_deadline():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = Peer(Channel(ours), actions={}, tell=lambda error: Told("", "", ""))
        peer.channel.deadline = 0.0
        with pytest.raises(Disconnected) as caught:
            peer.request("anything")
        assert isinstance(caught.value.reason, TimeoutError)
