import copy
import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from pruning101.core import masks, measure


def lenet_300_100():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def snapshot(model):
    tensors = {
        name: (id(t), t.requires_grad, t.grad, t.detach().clone())
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    return tensors, [m.training for m in model.modules()]


def assert_same(model, before):
    tensors, training = snapshot(model)
    assert training == before[1]
    assert tensors.keys() == before[0].keys()
    for name, (identity, requires_grad, grad, value) in tensors.items():
        was = before[0][name]
        assert (identity, requires_grad) == was[:2], name
        assert grad is was[2], name
        assert torch.equal(value, was[3]), name


# Parameters, MACs (in units of 1e9) and depth as the papers and torchvision publish them.
PUBLISHED = {
    "resnet18": (18, 1.814),
    "resnet50": (50, 4.089),
    "mobilenet_v2": (53, 0.301),
    "swin_t": (53, 4.491),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_agrees_with_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    meta = models.get_model_weights(name)["IMAGENET1K_V1"].meta
    found = measure.footprint(models.get_model(name), torch.zeros(2, 3, 224, 224))
    depth, gigamacs = PUBLISHED[name]
    assert found.parameters == meta["num_params"]
    assert round(found.macs / 1e9, 3) == gigamacs == meta["_ops"]
    assert found.depth == depth


@pytest.mark.slow
@pytest.mark.parametrize(("name", "depth"), [("vgg16_bn", 16), ("vit_b_16", 50)])
def test_agrees_with_torchvision_on_large_models(name, depth):
    models = pytest.importorskip("torchvision.models")
    meta = models.get_model_weights(name)["IMAGENET1K_V1"].meta
    found = measure.footprint(models.get_model(name), torch.zeros(1, 3, 224, 224))
    assert found.parameters == meta["num_params"]
    assert found.macs / 1e9 == pytest.approx(meta["_ops"], rel=1e-4)
    assert found.depth == depth


def test_lenet_300_100():
    found = measure.footprint(lenet_300_100(), torch.zeros(5, 1, 28, 28))
    assert found.parameters == 266_610
    assert found.macs == 784 * 300 + 300 * 100 + 100 * 10
    assert found.depth == 3
    assert found.dense_bytes == 4 * 266_610
    assert found.coded_bytes < found.dense_bytes


@pytest.mark.parametrize("batch_size", [1, 4])
def test_macs_of_convolutions_do_not_depend_on_the_batch(batch_size):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(5, 2, 1)
    )
    found = measure.footprint(model, torch.zeros(batch_size, 4, 8, 8))
    expected = 6 * 2 * 9 * 36 + 6 * 5 * 4 * 36 + 5 * 2 * 144
    assert found.macs == expected
    assert found.depth == 3


@pytest.mark.parametrize("training", [True, False])
def test_attention_is_counted_whatever_path_runs_it(training):
    tokens, width = 5, 8
    layer = nn.TransformerEncoderLayer(width, 2, dim_feedforward=16, batch_first=True)
    layer.train(training)
    found = measure.footprint(layer, torch.zeros(3, tokens, width))
    projections = 4 * tokens * width * width + 2 * tokens * width * 16
    products = 2 * tokens * tokens * width
    assert found.macs == projections + products
    assert found.depth == 4


def test_functional_attention_is_counted():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    found = measure.footprint(Attention(), torch.zeros(2, 6, 8))
    assert found.macs == 6 * 8 * 32 + 2 * 6 * 6 * 8
    assert found.depth == 2


class Branches(nn.Module):
    """Two branches of different length, joined in place; and a head that nothing uses."""

    def __init__(self, branch=3):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.branch = nn.Sequential(*(nn.Linear(4, 4) for _ in range(branch)))
        self.short = nn.Linear(4, 4)
        self.unused = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.norm(x)
        x.relu_()
        x = self.first(x)
        self.unused(x)
        y = torch.zeros(x.shape[0], 8)
        y[:, :4] = self.short(x)
        y[:, 4:] += self.branch(x)
        return {"answer": (y.relu_(),)}


@given(st.integers(0, 6))
@settings(max_examples=7, deadline=None)
def test_depth_is_the_longest_path_to_the_output(branch):
    found = measure.footprint(Branches(branch), torch.zeros(2, 4))
    assert found.depth == 1 + max(branch, 1)


def test_depth_counts_calls_and_ignores_products_without_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.table = nn.Linear(4, 4)

        def forward(self, x):
            constant = self.table(torch.ones(1, 4))  # does not depend on the input
            x = self.layer(self.layer(x)) + constant
            return x @ x.T @ torch.ones(x.shape[0], 1)

    assert measure.footprint(Model(), torch.zeros(3, 4)).depth == 2


def test_several_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.layer = nn.Linear(4, 2)

        def forward(self, x, labels):
            return self.layer(x + self.embedding(labels))

    found = measure.footprint(Model(), (torch.zeros(3, 4), torch.tensor([0, 1, 4])))
    assert (found.macs, found.depth, found.parameters) == (8, 1, 30)


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    found = measure.footprint(model, torch.zeros(1, 4))
    assert (found.parameters, found.nonzero, found.dense_bytes) == (16, 16, 64)
    assert (found.macs, found.depth) == (32, 2)
    state = measure.decode_state(measure.coded_state(model))
    assert torch.equal(state["0.weight"], state["2.weight"])
    masks.apply(model, {"0.weight": torch.eye(4).bool()})
    found = measure.footprint(model, torch.zeros(1, 4))
    assert (found.parameters, found.nonzero, found.dense_bytes) == (16, 4, 64)


def masked_lenet(kept=0.1):
    model = lenet_300_100()
    for layer in (model[1], model[3], model[5]):
        prune.l1_unstructured(layer, "weight", 1 - kept)
    return model


def test_masked_model_counts_like_its_dense_twin():
    dense, masked = (
        measure.footprint(m, torch.zeros(1, 1, 28, 28)) for m in (lenet_300_100(), masked_lenet())
    )
    assert masked.parameters == dense.parameters
    assert masked.dense_bytes == dense.dense_bytes
    assert (masked.macs, masked.depth) == (dense.macs, dense.depth)
    assert masked.nonzero == 266_200 // 10 + 410


def test_a_permanent_mask_costs_the_same_bytes_as_the_mask():
    model = masked_lenet()
    masked = measure.footprint(model, torch.zeros(1, 1, 28, 28))
    for layer in (model[1], model[3], model[5]):
        prune.remove(layer, "weight")
    assert measure.footprint(model, torch.zeros(1, 1, 28, 28)) == masked


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_measuring_leaves_no_trace(training, frozen):
    model = nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(144, 3),
    )
    prune.random_unstructured(model[6], "weight", 0.5)
    model.train(training)
    model[2].eval()
    model.requires_grad_(not frozen)
    if not frozen:
        model(torch.randn(2, 1, 8, 8)).sum().backward()
    effective = model[6].weight
    example = torch.randn(2, 1, 8, 8)
    before, state = snapshot(model), torch.random.get_rng_state()
    kept = example.clone()
    measure.footprint(model, example)
    measure.latency(model, example)
    assert_same(model, before)
    assert model[6].weight is effective
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(example, kept)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_buffer_written_in_forward_is_put_back_even_after_an_error():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            if x.shape[0] > 1:
                raise RuntimeError("too many")
            return x

    model = Counter()
    measure.footprint(model, torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="too many"):
        measure.footprint(model, torch.zeros(2, 2))
    assert model.calls == 0
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="empty batch"):
        measure.footprint(nn.Linear(2, 2), torch.zeros(0, 2))


# --- coded bytes ------------------------------------------------------------------------------

VALUES = {
    torch.float32: [0.0, 1.5, -2.0, math.inf, -math.inf, 1e-42, 3.14],
    torch.float64: [0.0, 1e-300, -2.0, math.inf],
    torch.bfloat16: [0.0, 1.5, -3.0],
    torch.float16: [0.0, 1.5, 6e-8],
    torch.int64: [0, -1, 2**62],
    torch.bool: [False, True],
}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_coding_gives_every_value_back(data):
    model = nn.Module()
    for i in range(data.draw(st.integers(0, 3))):
        dtype = data.draw(st.sampled_from(list(VALUES)))
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        count = math.prod(shape)
        values = data.draw(st.lists(st.sampled_from(VALUES[dtype]), min_size=count, max_size=count))
        model.register_buffer(f"b{i}", torch.tensor(values, dtype=dtype).reshape(shape))
    state = measure.decode_state(measure.coded_state(model))
    assert state.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert state[name].dtype == buffer.dtype
        assert state[name].shape == buffer.shape
        assert torch.equal(state[name], buffer)


def test_nan_survives_coding():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[math.nan, 0.0, 2.0]])
    found = measure.decode_state(measure.coded_state(model))["weight"]
    assert torch.equal(found.isnan(), torch.tensor([[True, False, False]]))
    assert found[0, 2] == 2


def test_decoded_state_loads_into_a_plain_twin():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    twin = copy.deepcopy(model)
    model(torch.randn(8, 1, 8, 8))  # moves the statistics
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[3], "bias", 0.5)
    twin.load_state_dict(measure.decode_state(measure.coded_state(model)))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_coded_bytes_come_close_to_the_entropy():
    generator = torch.Generator().manual_seed(0)
    n, kept = 200_000, 0.05
    layer = nn.Linear(n, 1, bias=False)
    layer.weight.data = torch.randn(1, n, generator=generator)
    plain = len(measure.coded_state(layer))
    assert 0.80 < plain / (4 * n) < 0.90  # the exponent is all there is to gain
    layer.weight.data *= torch.rand(1, n, generator=generator) < kept
    places = n / 8 * -(kept * math.log2(kept) + (1 - kept) * math.log2(1 - kept))
    ideal = places + kept * plain
    assert ideal < len(measure.coded_state(layer)) < 1.15 * ideal


def test_zeros_in_whole_rows_cost_next_to_nothing():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 256, bias=False)
    layer.weight.data = torch.randn(256, 256, generator=generator)
    scattered = nn.Linear(256, 256, bias=False)
    scattered.weight.data = layer.weight * (torch.rand(256, 256, generator=generator) < 0.5)
    dense = len(measure.coded_state(layer))
    layer.weight.data[128:] = 0
    assert abs(len(measure.coded_state(layer)) - dense / 2) < 400
    assert len(measure.coded_state(scattered)) > dense / 2 + 256 * 256 / 8 * 0.8


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"something else",
        measure.coded_state(nn.Linear(3, 3))[:-5],
        (9).to_bytes(8, "little") + zlib.compress(b"7"),
    ],
)
def test_damaged_bytes_are_refused_in_a_sentence(damaged):
    with pytest.raises(ValueError, match="not a whole coded state"):
        measure.decode_state(damaged)


# --- latency ----------------------------------------------------------------------------------


def test_latency_runs_in_inference_mode_with_fixed_threads():
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled(), self.training))
            return x

    before = torch.get_num_threads()
    model = Model()
    found = measure.latency(model, torch.zeros(1), threads=before + 1)
    assert set(seen) == {(before + 1, True, False)}
    assert torch.get_num_threads() == before
    assert model.training
    assert 5 <= found.repeats < len(seen)
    assert found.median_ms > 0
    assert found.iqr_ms >= 0


def test_threads_are_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure.latency(nn.Linear(2, 2), torch.zeros(1, 3), threads=before + 1)
    assert torch.get_num_threads() == before


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        measure.latency(nn.Linear(2, 2), torch.zeros(1, 2), threads=0)
