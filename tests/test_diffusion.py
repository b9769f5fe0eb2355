"""Diffusion on small images: noise, loss, sampler; and the Frechet distance of what it makes."""

import math

import pytest
import torch
from torch import nn

from pruning101 import lacoot
from pruning101.core import diffusion, frechet, masks, models, structure
from pruning101.core.data import load
from pruning101.core.training import evaluate, fit


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def kept(t: int) -> float:
    """abar by its definition, for 1,000 betas from 1e-4 to 0.02."""
    return math.prod(1 - (1e-4 + s / 999 * (0.02 - 1e-4)) for s in range(t + 1))


KEPT = torch.tensor([kept(t) for t in range(1000)], dtype=torch.float64)


class Knows(nn.Module):
    """The best prediction of the noise where class k is Gaussian, of mean `means[k]`.

    The last row of `means` is for "no class". E[noise | x] is the regression of noise on
    x = sqrt(abar) (mean + std z) + sqrt(1 - abar) noise.
    """

    def __init__(self, means, std=0.0):
        super().__init__()
        self.label_embed = nn.Embedding(len(means), 1).double()
        self.means, self.std, self.seen, self.modes = means, std, [], []

    def forward(self, images, timesteps, labels):
        self.seen.append((images, timesteps, labels))
        self.modes.append(self.training)
        abar = KEPT[timesteps].view(-1, 1, 1, 1)
        centred = images - abar.sqrt() * self.means[labels]
        return (1 - abar).sqrt() * centred / (abar * self.std**2 + 1 - abar)


# --- noise --------------------------------------------------------------------------------------


def test_noised_is_the_mixture_of_the_definition():
    x, noise = draw(4, 2, 3, 3, dtype=torch.float64), draw(4, 2, 3, 3, seed=1, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 999])
    expected = [
        math.sqrt(kept(n)) * image + math.sqrt(1 - kept(n)) * other
        for n, image, other in zip(t.tolist(), x, noise, strict=True)
    ]
    torch.testing.assert_close(diffusion.noised(x, t, noise), torch.stack(expected))


def test_noised_keeps_the_variance_and_goes_from_image_to_noise():
    x, noise = draw(1, 1, 200, 200), draw(1, 1, 200, 200, seed=1)
    mixed = [diffusion.noised(x, torch.tensor([t]), noise) for t in (0, 300, 999)]
    for image in mixed:
        assert image.var().item() == pytest.approx(1, abs=0.03)
    assert (mixed[0] - x).abs().mean() < 0.02
    assert (mixed[-1] - noise).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("timesteps", "noise", "words"),
    [
        (torch.tensor([1]), draw(2, 1, 4, 4), r"one timestep each; got \[2, 1, 4, 4\] and \[1\]"),
        (torch.tensor([1, 2]), draw(2, 1, 4, 1), r"noise of that shape .* got \[2, 1, 4, 1\]"),
        (torch.tensor([0, 1000]), draw(2, 1, 4, 4), r"in \[0, 999\], not 0 to 1000"),
        (torch.tensor([-1, 5]), draw(2, 1, 4, 4), r"in \[0, 999\], not -1 to 5"),
    ],
)
def test_noise_that_does_not_fit_is_refused(timesteps, noise, words):
    with pytest.raises(ValueError, match=words):
        diffusion.noised(draw(2, 1, 4, 4), timesteps, noise)


# --- the loss -----------------------------------------------------------------------------------


def test_the_loss_is_nothing_for_who_knows_the_noise_and_one_for_who_says_zero():
    means = draw(4, 1, 5, 5, dtype=torch.float64)
    means[3] = means[0]  # all images are of class 0, so "no class" is it, too
    labels = torch.zeros(600, dtype=torch.int64)
    knows = Knows(means)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert diffusion.denoising_loss(knows, means[labels], labels) < 1e-12
        silent = Knows(means)
        silent.forward = lambda x, t, y: torch.zeros_like(x)
        loss = diffusion.denoising_loss(silent, means[labels], labels)
    assert loss.item() == pytest.approx(1, abs=0.05)
    _, timesteps, _ = knows.seen[0]
    assert timesteps.min() < 20
    assert timesteps.max() > 979
    assert timesteps.float().mean().item() == pytest.approx(499.5, abs=40)


def test_the_loss_drops_a_tenth_of_the_labels():
    knows = Knows(draw(4, 1, 2, 2, dtype=torch.float64))
    labels = torch.arange(5000) % 3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        diffusion.denoising_loss(knows, draw(5000, 1, 2, 2, dtype=torch.float64), labels)
    _, _, seen = knows.seen[0]
    dropped = seen == 3
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(seen[~dropped], labels[~dropped])


def test_a_model_without_classes_is_refused():
    for call in (
        lambda: diffusion.denoising_loss(nn.Linear(2, 2), draw(2, 1, 2, 2), torch.tensor([0, 1])),
        lambda: diffusion.sample(nn.Linear(2, 2), [0], image_shape=(1, 2, 2)),
    ):
        with pytest.raises(ValueError, match="must have a label_embed"):
            call()


# --- the sampler --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_the_sampler_arrives_at_the_only_image_there_is(steps):
    means = draw(4, 2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([2, 0, 1, 2])
    images = diffusion.sample(Knows(means), labels, image_shape=(2, 3, 5), steps=steps)
    torch.testing.assert_close(images, means[labels], rtol=1e-9, atol=1e-9)


def test_the_sampler_maps_noise_to_a_gaussian_as_the_exact_flow_does():
    """For Gaussian data the flow keeps (x - mean of x) / (deviation of x)."""
    means, std = 3 * draw(3, 1, 4, 4, dtype=torch.float64), 0.5
    labels, shape = [0] * 50 + [1] * 50, (1, 4, 4)
    options = {"image_shape": shape, "steps": 1000, "seed": 0}
    noise = diffusion.sample(Knows(torch.zeros(3, 1, 4, 4), 1.0), labels, **options)
    images = diffusion.sample(Knows(means, std), labels, **options)
    start, last = means[torch.tensor(labels)], KEPT[-1]
    # standard normal data and noise are all alike: that flow moves nothing, and shows the noise
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    deviation = (last * std**2 + 1 - last).sqrt()
    expected = start + std * (noise - last.sqrt() * start) / deviation
    torch.testing.assert_close(images, expected, rtol=0.01, atol=0.01)


def test_guidance_goes_on_beyond_the_class():
    """Predictions are linear in the means, so guidance makes the image m + w (mean - m)."""
    means = draw(3, 1, 4, 4, dtype=torch.float64)
    for guidance in (0.0, 0.5, 1.0, 3.0):
        images = diffusion.sample(Knows(means), [1], image_shape=(1, 4, 4), guidance=guidance)
        torch.testing.assert_close(images[0], means[2] + guidance * (means[1] - means[2]))


def test_limits_are_black_and_white_and_clamp_what_a_step_foresees():
    data = load("digits")
    low, high = diffusion.limits(data)
    (images, _), *_ = data.batches("train", len(data.train))
    assert low.shape == high.shape == (1, 1, 1)
    assert (images.min(), images.max()) == (pytest.approx(low.item()), pytest.approx(high.item()))
    means = torch.tensor([-5.0, 0.5]).double().view(2, 1, 1, 1).expand(2, 1, 4, 4)
    made = diffusion.sample(Knows(means), [0], image_shape=(1, 4, 4), limits=(low, high))
    torch.testing.assert_close(made, low.double().expand(1, 1, 4, 4))
    options = {"image_shape": (1, 4, 4), "guidance": 0.0, "steps": 9}
    inside = diffusion.sample(Knows(means), [0], **options, limits=(low, high))
    torch.testing.assert_close(inside, means[1:], rtol=1e-9, atol=1e-9)
    # what the first step foresees is far outside; the second begins with what is then left as noise
    wild = Knows(means)
    wild.register_forward_hook(lambda module, args, out: torch.full_like(out, 7.0))
    diffusion.sample(wild, [0], image_shape=(1, 4, 4), steps=2, limits=(low, high))
    _, (x, t, _), (following, t_next, _) = wild.seen
    assert [t.item(), t_next.item()] == [999, 0]
    clean = ((x - (1 - KEPT[999]).sqrt() * 7) / KEPT[999].sqrt()).clamp(low, high)
    noise = (x - KEPT[999].sqrt() * clean) / (1 - KEPT[999]).sqrt()
    expected = KEPT[0].sqrt() * clean + (1 - KEPT[0]).sqrt() * noise
    torch.testing.assert_close(following, expected)
    silent = stirred()
    made = diffusion.sample(silent, [1], image_shape=(1, 8, 8), limits=(low, high))
    assert (made >= low).all()
    assert (made <= high).all()


def test_the_model_is_asked_once_a_step_and_twice_with_guidance():
    asked = []
    for guidance in (1.0, 2.0):
        model = Knows(draw(3, 1, 4, 4, dtype=torch.float64))
        diffusion.sample(model, [0, 1], image_shape=(1, 4, 4), steps=5, guidance=guidance)
        first, *steps = model.seen  # one image, to see whether it is taken
        asked.append([len(labels) for _, _, labels in steps])
        assert [t[0].item() for _, t, _ in steps] == [999, 749, 500, 250, 0]
        assert all((t == t[0]).all() for _, t, _ in steps)
        assert len(first[0]) == guidance
        assert model.training
        assert not any(model.modes)
    assert asked == [[2] * 5, [4] * 5]


def stirred():
    """A transformer whose last layers are not 0 any more, with a mode of its own for one part."""
    model = models.build("dit_tiny", classes=10, in_channels=1, image_size=8)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.02 * draw(*p.shape, seed=i))
    model.blocks[2].eval()
    return model


def test_sampling_depends_on_the_seed_alone_and_leaves_the_model_as_it_was():
    model = stirred()
    masks.apply(model, {"head.weight": torch.ones_like(model.head.weight, dtype=torch.bool)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    made = []
    for global_seed, seed in ((1, 3), (2, 3), (1, 4)):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            random_state = torch.get_rng_state()
            made.append(
                diffusion.sample(model, range(10), image_shape=(1, 8, 8), steps=3, seed=seed)
            )
            assert torch.equal(torch.get_rng_state(), random_state)
    assert made[0].shape == (10, 1, 8, 8)
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2], atol=0.1)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.weight.requires_grad
    assert not made[0].requires_grad


def test_many_samples_are_those_of_smaller_calls(monkeypatch):
    model, options = stirred(), {"image_shape": (1, 8, 8), "steps": 2, "guidance": 2.0}
    whole = diffusion.sample(model, list(range(10)), **options)
    monkeypatch.setattr(diffusion, "_TOGETHER", 4)
    parts = diffusion.sample(model, list(range(10)), **options)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"labels": [0, 10]}, r"labels must be in \[0, 9\], the classes of the model, not 0 to 10"),
        ({"labels": [-1]}, "labels must be in"),
        ({"labels": []}, "one or more whole numbers"),
        ({"labels": [[1]]}, r"shape \[1, 1\]"),
        ({"labels": [0.5]}, "torch.float32"),
        ({"image_shape": (8, 8)}, r"channels, height and width, not \(8, 8\)"),
        ({"image_shape": (1, 0, 8)}, "channels, height and width"),
        ({"image_shape": (3, 8, 8)}, "does not take images of 3 x 8 x 8.*in_channels=3"),
        ({"image_shape": (1, 10, 10)}, "does not take images of 1 x 10 x 10"),
        ({"steps": 0}, r"steps must be a whole number in \[1, 1000\], not 0"),
        ({"steps": 1001}, "steps must be"),
        ({"steps": 2.0}, "steps must be"),
        ({"guidance": -1.0}, "guidance must be a finite number, 0 or more"),
        ({"guidance": math.nan}, "guidance must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_what_cannot_be_sampled_is_refused(changed, words):
    settings = {"labels": [0, 1], "image_shape": (1, 8, 8), "steps": 2} | changed
    with pytest.raises(ValueError, match=words):
        diffusion.sample(stirred(), settings.pop("labels"), **settings)


def test_samples_that_are_not_finite_are_told():
    model = stirred()
    model.head.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="samples hold NaN"):
        diffusion.sample(model, [0], image_shape=(1, 8, 8), steps=2)


# --- a transformer that is trained, and loses blocks ----------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load("digits").subset(train=256, valid=64)


def trained(data, path, stop_after=None):
    """Three epochs of four steps with a penalty, or fewer; and their history."""
    model, steps = models.build("dit_tiny", classes=10, in_channels=1, image_size=8), []

    def after_step(m):
        steps.append(m)
        if len(steps) == stop_after:
            raise KeyboardInterrupt

    settings = dict(epochs=3, lr=2e-3, optimizer="adam", batch_size=64, checkpoint=path)
    with lacoot.BlockDistances(model, [f"blocks.{i}" for i in range(6)]) as distances:
        history = fit(
            model,
            data,
            objective=diffusion.denoising_loss,
            penalty=distances.penalty(0.1),
            after_step=after_step,
            **settings,
        )
    return model, history


def test_training_with_a_penalty_resumes_to_the_same_bits(digits, tmp_path):
    straight, expected = trained(digits, tmp_path / "straight.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(digits, tmp_path / "cut.pt", stop_after=7)
    model, history = trained(digits, tmp_path / "cut.pt")
    other = straight.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
    assert [e.valid_loss for e in history] == [e.valid_loss for e in expected]


def test_a_trained_transformer_samples_with_two_blocks_fewer(digits, tmp_path):
    model, history = trained(digits, None)
    assert history.last.valid_loss < 0.9
    assert all(math.isnan(e.accuracy) and math.isnan(e.valid_accuracy) for e in history)
    score = evaluate(model, digits, "valid", objective=diffusion.denoising_loss)
    assert score.loss == history.last.valid_loss
    images, labels = next(iter(digits.batches("valid", 64)))
    inputs = (images, torch.arange(64) * 15, labels)
    blocks = structure.removable_blocks(model, inputs)
    assert blocks == [f"blocks.{i}" for i in range(6)]
    ranked = list(lacoot.block_distances(model, [(inputs, labels)]))
    assert sorted(ranked) == blocks
    for name in ranked[:2]:
        structure.remove_block(model, name)
    assert diffusion.sample(model, [3, 4], image_shape=(1, 8, 8), steps=2).shape == (2, 1, 8, 8)


# --- Frechet distance -----------------------------------------------------------------------------


def with_moments(mean, root, n=40, seed=0):
    """Rows whose mean and covariance root root^T are exactly these."""
    rows = draw(n, len(mean), seed=seed, dtype=torch.float64)
    rows = rows - rows.mean(0)
    rows = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T @ rows / (n - 1))).T
    return rows @ root.T + mean


def test_distance_of_diagonal_covariances_is_the_closed_form():
    mean_a, mean_b = torch.tensor([1.0, 0.0, 3.0]).double(), torch.tensor([0.0, 2.0, 3.0]).double()
    var_a, var_b = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([9.0, 1.0, 0.25]).double()
    a = with_moments(mean_a, var_a.sqrt().diag())
    b = with_moments(mean_b, var_b.sqrt().diag(), n=25, seed=1)
    # per direction (mean difference)^2 + (deviation difference)^2
    assert frechet.frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2)


def test_distance_of_commuting_covariances_is_that_of_their_roots():
    q = torch.linalg.qr(draw(5, 5, dtype=torch.float64)).Q
    x, y = (draw(5, seed=s, dtype=torch.float64).abs() for s in (1, 2))
    x[0], y[1] = 0, 0  # singular, each along another direction
    zero = torch.zeros(5).double()
    a = with_moments(zero, q * x)
    b = with_moments(zero, q * y, seed=3)
    expected = (x - y).square().sum().item()
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 40, 7), (30, 30, 1), (200, 8, 12), (5, 6, 20)])
def test_distance_is_that_of_scipy(n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    a = draw(n, d, dtype=torch.float64)
    b = draw(m, d, seed=1, dtype=torch.float64) @ draw(d, d, seed=2, dtype=torch.float64) + 0.3
    ours = frechet.frechet_distance(a, b)
    assert ours == pytest.approx(frechet.frechet_distance(b, a), rel=1e-9)
    covariances = [torch.cov(rows.T).reshape(d, d) for rows in (a, b)]
    product = (covariances[0] @ covariances[1]).numpy()
    if min(n, m) > d:
        root = linalg.sqrtm(product).real.trace()
    else:  # singular, where sqrtm is not to be relied on: eigenvalues instead
        root = linalg.eigvals(product).real.clip(0) ** 0.5
        root = root.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances)
    assert ours == pytest.approx((expected - 2 * root).item(), rel=1e-5)


def test_distance_of_a_set_to_itself_is_zero_and_to_a_shifted_one_the_shift():
    for n, d in ((50, 4), (4, 30)):
        a = 100 * draw(n, d)
        assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
        assert frechet.frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-8)
        assert frechet.frechet_distance(a, a.double() + 2) == pytest.approx(4 * d, rel=1e-9)


def test_few_samples_are_further_apart_than_many():
    def mean_distance(n):
        pairs = [(draw(n, 6, seed=s), draw(n, 6, seed=1000 + s)) for s in range(30)]
        return sum(frechet.frechet_distance(a, b) for a, b in pairs) / 30

    assert mean_distance(20) > 2.5 * mean_distance(80)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (draw(1, 3), draw(4, 3), r"a must be .* two or more images, not \[1, 3\]"),
        (draw(4, 3), draw(4), r"b must be .* not \[4\]"),
        (draw(4, 3), draw(4, 2), "a has 3 features an image and b 2"),
        (draw(4, 3), draw(4, 3) * math.nan, "b holds NaN"),
        (draw(4, 3) / 0, draw(4, 3), "a holds NaN or infinity"),
    ],
)
def test_what_has_no_distance_is_refused(a, b, words):
    for function in (frechet.frechet_distance, frechet.frechet_interval):
        with pytest.raises(ValueError, match=words):
            function(a, b)


def test_the_interval_is_of_its_seed_and_contains_the_value():
    a, b = draw(60, 4), draw(50, 4, seed=1) + 0.5
    first, again, other = (frechet.frechet_interval(a, b, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert first.value == frechet.frechet_distance(a, b)
    assert 0 <= first.low < first.value < first.high
    wide = frechet.frechet_interval(a, b, level=0.99)
    assert wide.low < first.low
    assert wide.high > first.high
    near = frechet.frechet_interval(draw(9, 2), draw(9, 2) + 1e-3)
    assert near.low == 0


def test_the_interval_covers_what_other_samples_give():
    """In about 95 of 100 draws it holds the mean distance of sets of this size."""
    covered = 0
    pairs = [(draw(80, 3, seed=s), 1 + 1.5 * draw(80, 3, seed=500 + s)) for s in range(40)]
    values = [frechet.frechet_distance(a, b) for a, b in pairs]
    mean = sum(values) / len(values)
    for a, b in pairs:
        found = frechet.frechet_interval(a, b, resamples=60)
        covered += found.low <= mean <= found.high
    assert covered >= 35
    halves = [frechet.frechet_interval(a, b, resamples=60, level=0.5) for a, b in pairs]
    assert 12 <= sum(i.low <= mean <= i.high for i in halves) <= 28


@pytest.mark.parametrize("options", [{"level": 1.0}, {"level": 0}, {"resamples": 1}, {"seed": -1}])
def test_bad_options_of_the_interval_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        frechet.frechet_interval(draw(4, 2), draw(4, 2), **options)


def test_features_go_into_the_last_linear_layer(monkeypatch):
    classifier = models.build("lenet_300_100", in_channels=1, image_size=8)
    classifier.train()
    keep = {"fc3.weight": torch.arange(1000).view(10, 100) % 3 > 0}
    masks.apply(classifier, keep)
    hooks = [len(m._forward_pre_hooks) for m in classifier.modules()]
    images = draw(21, 1, 8, 8)
    last = classifier.fc3
    seen = []
    for layers in (512, 8):  # side by side
        monkeypatch.setattr(frechet, "_TOGETHER", layers)
        found = frechet.features(classifier, images)
        assert found.shape == (21, 100)
        seen.append(found)
    torch.testing.assert_close(*seen)
    assert last.weight.requires_grad
    assert classifier.training
    assert hooks == [len(m._forward_pre_hooks) for m in classifier.modules()]
    torch.testing.assert_close(last(found), classifier(images))


def test_features_are_those_of_eval_mode_whatever_the_order_of_names(monkeypatch):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body, self.drop = nn.Linear(5, 2), nn.Linear(4, 5), nn.Dropout(0.9)

        def forward(self, images):
            return self.head(self.drop(self.body(images.flatten(1))))

    model, images = Backwards(), draw(6, 1, 2, 2)
    expected = model.body(images.flatten(1))
    monkeypatch.setattr(frechet, "_TOGETHER", 2)
    torch.testing.assert_close(frechet.features(model, images), expected)
    assert not frechet.features(model, images).requires_grad


def test_images_without_features_are_refused():
    classifier = models.build("lenet_300_100", in_channels=1, image_size=8)
    with pytest.raises(ValueError, match=r"images must be \[N, C, H, W\], one or more"):
        frechet.features(classifier, draw(0, 1, 8, 8))
    with pytest.raises(ValueError, match="classifier does not take images of 1 x 9 x 9"):
        frechet.features(classifier, draw(2, 1, 9, 9))
    with pytest.raises(ValueError, match=r"calls no nn\.Linear"):
        frechet.features(nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten()), draw(2, 1, 8, 8))
    assert not any(m._forward_pre_hooks for m in classifier.modules())
