import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from pruning101.core import masks


def small_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        )


def magnitudes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().abs() for n, p in model.named_parameters() if p.ndim > 1}


# Few distinct values, so that most examples are full of ties.
tied = st.integers(-3, 3).map(float)
score_lists = st.lists(
    st.lists(st.one_of(tied, st.floats(width=32, allow_nan=False)), min_size=1, max_size=30),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=200)
@given(score_lists, st.floats(0, 1))
@example([[0.0, -0.0, 1.0], [0.0]], 0.5)
@example([[float("inf")] * 3, [float("-inf")] * 3], 0.5)
@example([[1.0] * 7], 0.5)
def test_the_lowest_go_first_by_position_and_exactly_as_many_as_asked(lists, sparsity):
    scores = {f"layer{i}.weight": torch.tensor(values) for i, values in enumerate(lists)}
    flat = [value for score in scores.values() for value in score.tolist()]
    order = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    gone = set(order[: round(sparsity * len(flat))])
    result = masks.from_scores(scores, sparsity)
    assert list(result) == list(scores)
    kept = torch.cat([result[name] for name in scores]).tolist()
    assert kept == [i not in gone for i in range(len(flat))]


@settings(deadline=None, max_examples=50)
@given(score_lists, st.floats(0, 1))
def test_layer_scope_cuts_each_tensor_by_itself(lists, sparsity):
    scores = {str(i): torch.tensor(values) for i, values in enumerate(lists)}
    result = masks.from_scores(scores, sparsity, scope="layer")
    for name, score in scores.items():
        assert (~result[name]).sum() == round(sparsity * score.numel())
        assert torch.equal(result[name], masks.from_scores({name: score}, sparsity)[name])


@pytest.mark.parametrize("kind", ["normal", "mostly zero", "sorted", "rare outliers", "constant"])
@pytest.mark.parametrize("sparsity", [1e-6, 0.1, 0.5, 0.83, 0.97, 1 - 1e-6])
def test_large_tensors_are_cut_as_a_full_stable_sort_would(kind, sparsity):
    n = 700_001
    values = torch.randn(n, generator=torch.Generator().manual_seed(1))
    if kind == "mostly zero":
        values[torch.arange(n) % 5 != 0] = 0
    elif kind == "sorted":
        values = values.sort().values
    elif kind == "rare outliers":  # the sample, which sees every fifth score, misses the rest
        values = torch.where(torch.arange(n) % 5 == 0, 5 + values, values - 5)
    elif kind == "constant":
        values = torch.ones(n)
    scores = {"a": values[:3], "b": values[3:400_002].view(3, -1), "c": values[400_002:]}
    kept = torch.cat([m.flatten() for m in masks.from_scores(scores, sparsity).values()])
    expected = torch.ones(n, dtype=torch.bool)
    expected[values.sort(stable=True).indices[: round(sparsity * n)]] = False
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_any_real_dtype(dtype):
    score = (torch.randperm(1000, generator=torch.Generator().manual_seed(0)) % 77).to(dtype)
    kept = masks.from_scores({"w": score}, 0.4)["w"]
    gone = score.double().sort(stable=True).indices[:400]
    assert not kept[gone].any()
    assert kept.sum() == 600


def test_mixed_dtypes_compare_exactly():
    low = torch.tensor([1.0], dtype=torch.float16)
    slightly_less = torch.tensor([1 - 1e-6], dtype=torch.float32)
    kept = masks.from_scores({"half": low, "single": slightly_less}, 0.5)
    assert kept["half"].item()
    assert not kept["single"].item()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_agrees_with_torch_global_unstructured(seed, sparsity):
    ours, theirs = small_net(seed), small_net(seed)
    masks.apply(ours, masks.from_scores(magnitudes(ours), sparsity))
    layers = [(theirs[0], "weight"), (theirs[4], "weight")]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    x = torch.ones(2, 1, 6, 6)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_agrees_with_torch_l1_unstructured(seed, sparsity):
    ours, theirs = small_net(seed), small_net(seed)
    masks.apply(ours, masks.from_scores(magnitudes(ours), sparsity, scope="layer"))
    for module in (theirs[0], theirs[4]):
        prune.l1_unstructured(module, "weight", amount=sparsity)
        assert torch.equal(masks.masks_of(theirs)["0.weight"], masks.masks_of(ours)["0.weight"])
    assert torch.equal(ours[4].weight, theirs[4].weight)


def half_masked(seed: int = 0) -> nn.Sequential:
    model = small_net(seed)
    masks.apply(model, masks.from_scores(magnitudes(model), 0.5))
    return model


def test_users_of_torch_prune_see_the_masks():
    model = half_masked()
    assert prune.is_pruned(model)
    assert model[4].weight_mask.dtype == model[4].weight_orig.dtype
    assert torch.equal(model[4].weight, model[4].weight_orig * model[4].weight_mask)
    before = masks.masks_of(model)["4.weight"]
    prune.l1_unstructured(model[4], "weight", amount=0.5)  # their further pruning stacks on ours
    after = masks.masks_of(model)["4.weight"]
    assert after.sum() == before.sum() - round(0.5 * before.sum().item())
    assert not (after & ~before).any()
    prune.remove(model[4], "weight")
    assert isinstance(model[4].weight, nn.Parameter)
    assert torch.equal(model[4].weight != 0, after)


def test_masks_are_set_exactly_and_replaced():
    model = small_net()
    before = model[4].weight.detach().clone()
    first = torch.zeros(5, 64, dtype=torch.bool)
    masks.apply(model, {"4.weight": first})
    assert not model[4].weight.any()
    second = torch.arange(320).view(5, 64) % 3 > 0
    masks.apply(model, {"4.weight": second})
    assert torch.equal(masks.masks_of(model)["4.weight"], second)
    assert torch.equal(model[4].weight, before * second)
    assert list(masks.masks_of(model)) == ["4.weight"]
    assert len(model[4]._forward_pre_hooks) == 1


def test_a_bias_and_a_bare_layer_can_be_masked():
    layer = nn.Linear(3, 2)
    masks.apply(layer, {"bias": torch.tensor([True, False])})
    assert list(masks.masks_of(layer)) == ["bias"]
    assert layer(torch.zeros(1, 3))[0, 1] == 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.there, self.back = nn.Linear(6, 6), nn.Linear(6, 6)
        self.back.weight = self.there.weight

    def forward(self, x):
        return self.back(self.there(x).relu())


@pytest.mark.parametrize("name", ["there.weight", "back.weight"])
def test_a_weight_that_layers_share_is_masked_in_all_of_them(name):
    model = Tied()
    kept = torch.rand(6, 6) > 0.5
    masks.apply(model, {name: kept})
    optimiser = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.randn(4, 6)).sum().backward()
        optimiser.step()
    masks.refresh(model)
    assert torch.equal(model.there.weight, model.back.weight)
    assert not model.back.weight[~kept].any()
    assert len(list(model.parameters())) == 3
    masks.make_permanent(model)
    assert model.there.weight is model.back.weight


def test_sparsity_reads_weights_that_torch_computes():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    assert masks.sparsity(nn.Sequential(layer, nn.Linear(3, 2))) == 0


def test_sparsity_counts_weights_only_and_sees_permanent_zeros():
    model = half_masked()
    total = 4 * 9 + 64 * 5
    assert masks.sparsity(model) == round(total / 2) / total
    masks.make_permanent(model)
    assert masks.sparsity(model) == round(total / 2) / total
    assert masks.masks_of(model) == {}
    assert not prune.is_pruned(model)
    assert masks.sparsity(nn.ReLU()) == 0


def test_make_permanent_keeps_the_function_and_the_names():
    model = half_masked().eval()
    x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    before = model(x)
    masks.make_permanent(model)
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == set(small_net().state_dict())


OPTIMIZERS = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_stay_zero_under_any_optimiser(name):
    model = small_net()
    optimizer = OPTIMIZERS[name](model.parameters())
    generator = torch.Generator().manual_seed(0)

    def train(steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(8, 1, 6, 6, generator=generator)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    train(3)  # momentum and moments are non-zero when the masks come
    given_masks = masks.from_scores(magnitudes(model), 0.7)
    masks.apply(model, given_masks)
    before = model[4].weight.detach().clone()
    train(5)
    masks.refresh(model)
    for layer, key in ((model[0], "0.weight"), (model[4], "4.weight")):
        assert torch.equal(layer.weight != 0, given_masks[key])
    assert not torch.equal(model[4].weight, before)  # the kept weights do train


def test_masks_survive_saving_and_loading(tmp_path):
    model = half_masked()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = small_net(seed=1)
    masks.apply(other, {n: torch.ones_like(m) for n, m in masks.masks_of(model).items()})
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    masks.refresh(other)
    assert torch.equal(other[4].weight, model[4].weight)
    for name, mask in masks.masks_of(model).items():
        assert torch.equal(masks.masks_of(other)[name], mask)


def test_clone_copies_a_masked_model_in_use():
    model = half_masked()
    x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    model(x).sum().backward()
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    copied = masks.clone(model)
    model.eval(), copied.eval()
    assert torch.equal(copied(x), model(x))
    for name, mask in masks.masks_of(model).items():
        assert torch.equal(masks.masks_of(copied)[name], mask)
    expected = model(x)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    copied(x).sum().backward()
    assert torch.equal(model(x), expected)
    assert copied[4].weight_orig.grad is not None
    assert not copied[4].weight_orig.grad[~masks.masks_of(model)["4.weight"]].any()
    masks.make_permanent(copied)
    assert prune.is_pruned(model)


def test_a_clone_reads_its_own_weights_before_any_forward_pass():
    model = half_masked()
    with torch.no_grad():
        model[4].weight_orig.mul_(2)  # as an optimiser would: the effective weight is now stale
    copied = masks.clone(model)
    assert torch.equal(copied[4].weight, copied[4].weight_orig * copied[4].weight_mask)
    copied[4].weight.sum().backward()
    assert copied[4].weight_orig.grad is not None


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5", None])
def test_refuses_a_sparsity_that_is_no_share(sparsity):
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        masks.from_scores({"w": torch.ones(3)}, sparsity)


def test_refuses_scores_without_a_rank():
    with pytest.raises(ValueError, match=r"'b\.weight' contain NaN"):
        masks.from_scores({"a": torch.ones(3), "b.weight": torch.tensor([1.0, torch.nan])}, 0.5)
    with pytest.raises(ValueError, match="empty"):
        masks.from_scores({}, 0.5)
    with pytest.raises(ValueError, match="'a' are empty"):
        masks.from_scores({"a": torch.ones(0)}, 0.5)
    with pytest.raises(TypeError, match="real numbers"):
        masks.from_scores({"a": torch.ones(3, dtype=torch.complex64)}, 0.5)
    with pytest.raises(TypeError, match="real numbers"):
        masks.from_scores({"a": [1.0, 2.0]}, 0.5)
    for scores in (torch.ones(3), [torch.ones(3)]):
        with pytest.raises(TypeError, match="scores must be a dictionary by parameter name"):
            masks.from_scores(scores, 0.5)
    with pytest.raises(ValueError, match="scope"):
        masks.from_scores({"a": torch.ones(3)}, 0.5, scope="channel")


@pytest.mark.parametrize(
    ("name", "mask", "error", "words"),
    [
        ("4.wieght", torch.ones(5, 64, dtype=torch.bool), ValueError, r"near it are.*'4\.weight'"),
        ("4.weight", torch.ones(64, 5, dtype=torch.bool), ValueError, r"\(64, 5\).*\(5, 64\)"),
        ("4.weight", torch.ones(5, 64), TypeError, "bool tensor"),
        ("4.weight", [True], TypeError, "bool tensor"),
    ],
)
def test_a_bad_mask_changes_nothing(name, mask, error, words):
    model = small_net()
    with pytest.raises(error, match=words):
        masks.apply(model, {"0.weight": torch.zeros(4, 1, 3, 3, dtype=torch.bool), name: mask})
    assert not prune.is_pruned(model)
    assert model[0].weight.all()


def test_scores_that_carry_a_gradient_or_odd_strides_are_fine():
    weight = nn.Parameter(torch.arange(12.0).view(3, 4))
    kept = masks.from_scores({"w": weight.t()}, 0.25)["w"]  # positions are those of the view
    assert torch.equal(kept, weight.t() > 2)
    assert kept.shape == (4, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_masks_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    scores = {str(i): torch.randint(0, 500, (300, 400), generator=generator) / 7 for i in range(3)}
    on_gpu = masks.from_scores({n: s.cuda() for n, s in scores.items()}, 0.6)
    for name, mask in masks.from_scores(scores, 0.6).items():
        assert on_gpu[name].is_cuda
        assert torch.equal(on_gpu[name].cpu(), mask)


def test_the_output_projection_of_attention_stays_masked_and_still_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    mask = torch.rand(8, 8) > 0.5
    masks.apply(model, {"0.out_proj.weight": mask})
    masks.apply(model, {"0.out_proj.weight": mask})
    model = masks.clone(model)
    x = torch.randn(2, 3, 8)

    def outputs():
        return model[0](x, x, x)[0]

    before = outputs().detach()
    optimiser = torch.optim.SGD([model[0].out_proj.weight_orig], lr=1.0)
    outputs().square().sum().backward()
    optimiser.step()
    assert not torch.allclose(outputs(), before)
    effective = model[0].out_proj.weight
    assert (effective[~mask] == 0).all()
    assert torch.equal(effective[mask], model[0].out_proj.weight_orig[mask])
    assert len(model[0]._forward_pre_hooks) == 1


def test_a_forward_pass_lets_the_old_effective_weight_go_before_it_makes_the_new(monkeypatch):
    model, effective, there = half_masked(), masks._effective, []

    def watched(module, leaf):
        there.append(leaf in vars(module))
        return effective(module, leaf)

    monkeypatch.setattr(masks, "_effective", watched)
    model(torch.ones(2, 1, 6, 6))
    assert there == [False, False]
