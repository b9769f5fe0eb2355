# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,nbgrader,mystnb,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Activation entropy
#
# reading: 35 minutes · compute: about 1 minute ·
# before: lesson 6 (what can be folded and merged) ·
# paper: EGP, NEPENTHE, EASIER, TLC
#
# *A ReLU that is always on is a wire; one that is always off is a hole. If
# neither does anything, why keep it?* Lesson 6 taught each activation a
# slope to find out which ones a network can do without. The four methods
# of this lesson only look: how often is each unit on, and how often off?
# The layer that decides least goes, the rest is retrained, and again. So
# networks can lose half of their activations, or more, at little cost. What
# that buys is another question, and the answer is in lesson 6.
#
# ## You will be able to
#
# 1. **measure** how undecided the units of a layer are, batch by batch
#    (exercise 1), or read it off a norm without any data (exercise 2);
# 2. **spread** a budget of weights over layers as EGP does, and see where
#    it goes (exercise 3);
# 3. **tell** which activations are worth removing at all (exercise 4);
#
# and to ask of "12 of 17 activations removed" what became shallower.
#
# ## Set-up

# %% tags=["setup"]
import json
import sys
import time
import weakref
from collections import OrderedDict
from dataclasses import replace

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", "install -q pruning101")

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch import nn

from pruning101 import activation_entropy
from pruning101.core import activation_states, data, masks, measure
from pruning101.core import models, plots, steps, structure, training
from pruning101.course import material
from pruning101.layer_folding import fold
from pruning101.widgets import activation_entropy as widget
from pruning101.widgets.structured import relative_latency

torch.manual_seed(0)
torch.set_num_threads(1)  # small networks: more only get in each other's way
plots.use_style()
pd.set_option("display.width", 79)

# %% tags=["parameters"]
PROFILE = "quick"  # "standard": MNIST, minutes; "paper": CIFAR-10, long

# %% [markdown]
# Plain digits will not do: a linear network reads them nearly as well as
# any other. So half of the images, drawn by lot, are turned into negatives,
# black for white. No linear function can give an image and its negative the
# same answer, a constant aside: here a network *needs* an activation.
#
# The network has eight, in every place where one can stand: behind the
# stem, inside two residual blocks, behind their additions, behind a wide
# convolution, behind a narrow one, and in the classifier. Everything that
# could be non-linear besides, as max-pooling, is left out.

# %%
NAME, SIZE, IMAGES, WIDTH, EPOCHS, RETRAIN, SEEDS = {
    "quick": ("digits", 8, None, 4, 12, 2, 3),
    "standard": ("mnist", 16, 6_000, 8, 8, 2, 2),
    "paper": ("cifar10", 32, None, 64, 160, 160, 1),
}[PROFILE]
SETTINGS = {"batch_size": 64, "schedule": "cosine"}
LR = 0.05


def with_negatives(plain, seed=0):
    """The same images, half of them as negatives."""
    generator = torch.Generator().manual_seed(seed)
    splits = {}
    for name in ("train", "valid", "test"):
        split = getattr(plain, name)
        flip = torch.rand(len(split), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(flip, 255 - split.images, split.images)
        splits[name] = (images, split.labels)
    name = f"{plain.name} and negatives"
    return data.from_tensors(name, **splits, classes=plain.classes)


def network(seed, width=WIDTH):
    """Eight activations, two of them behind residual additions."""
    torch.manual_seed(seed)
    wide = 8 * width
    layers = OrderedDict(
        conv1=nn.Conv2d(1, width, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu1=nn.ReLU(),
        block1=models.BasicBlock(width, width, 1),
        block2=models.BasicBlock(width, width, 1),
        wide=nn.Conv2d(width, wide, 3, 2, padding=1, bias=False),
        bn2=nn.BatchNorm2d(wide),
        relu2=nn.ReLU(),
        narrow=nn.Conv2d(wide, width, 1, bias=False),
        bn3=nn.BatchNorm2d(width),
        relu3=nn.ReLU(),
        down=nn.AdaptiveAvgPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(4 * width, 64),
        relu4=nn.ReLU(),
        fc2=nn.Linear(64, 10),
    )
    return nn.Sequential(layers)


def trained(seed, model=None, epochs=EPOCHS):
    """A network trained with the lesson's settings; a new one by default."""
    model = network(seed) if model is None else model
    options = SETTINGS | {"lr": LR, "seed": seed, "progress": False}
    training.fit(model, dataset, epochs=epochs, **options)
    return model.eval()


def accuracy(model, split="test"):
    return training.evaluate(model, dataset, split).accuracy


def train_batches():
    return dataset.batches("train", 512)


plain = data.load(NAME, image_size=SIZE, channels=1).subset(train=IMAGES)
dataset = with_negatives(plain)
example, _ = next(iter(dataset.batches("valid", 64)))
dense = [trained(seed) for seed in range(SEEDS)]
names = list(structure.activations(dense[0]))
print(f"{dataset.name}: {len(dataset.train.images):,} images to learn from")
print("activations:", ", ".join(names))
print("test accuracy by seed:", *(f"{accuracy(m):.1%}" for m in dense))

# %% [markdown]
# ## Intuition
#
# What enters three of the activations, over a few hundred images. Blue is
# passed on, grey is cut off. If all of it were blue, or all grey, the ReLU
# would be a straight line on everything that it ever meets.
#
# **Predict before you go on:** which of the three would you remove first?
# And which layers could then be merged into one?

# %% mystnb={"image": {"alt": "Three histograms of pre-activations with a dashed line at zero, grey to its left and blue to its right. Left, relu2, behind a norm: a bell around zero, about half of it blue. Middle, block2.relu2, behind an addition: a bell moved to the right, most of it blue. Right, relu4, in the classifier: broad, most of it blue."}}
state = widget.precompute(network(0), dataset, epochs=EPOCHS, lr=LR)
shown = ("relu2", "block2.relu2", "relu4")
fig, axes = plt.subplots(1, 3, figsize=(8.2, 2.7))
for ax, name in zip(axes, shown, strict=True):
    widget.distribution(state, name, EPOCHS, ax=ax)
    ax.set_title(f"{name}\n{state.on[name][EPOCHS].mean():.0%} ON")
axes[0].legend(loc="upper right", handlelength=1)
for ax in axes[1:]:
    ax.set_ylabel("")
plt.show()

# %% [markdown]
# ## By hand
#
# Four inputs (rows), four units (columns). A unit is ON where its
# pre-activation is above 0, and its entropy is that of a coin that falls
# on ON as often: 1 bit at one half, 0 where it always falls the same way.
# But which way up is a zero?

# %% tags=["nbval-check-output"]
z = torch.tensor([[1.0, 2, 0, 0], [-1, 1, 0, 0], [3, 4, 0, 2], [-2, 1, 0, -1]])
conventions = {
    "ignore": (z > 0).sum(0) / (z != 0).sum(0).clamp(min=1),
    "on": (z >= 0).float().mean(0),
    "off": (z > 0).float().mean(0),
}
for zero, p in conventions.items():
    bits = activation_entropy.binary_entropy(p)
    print(
        f"zero {zero:7} share ON {p.tolist()}, "
        f"bits {[round(b, 3) for b in bits.tolist()]}"
    )

# %% [markdown]
# Unit 0 is undecided, unit 1 is a wire, unit 2 is dead. Of unit 3, two
# values of four are 0, as behind a layer that was pruned. The papers say:
# leave zeros out. EASIER's code counts them as ON, EGP's as OFF, and EGP
# also leaves out the units that never switch. The same layer has three
# entropies:

# %% tags=["nbval-check-output"]
papers = {
    "papers: ignore": {"zero": "ignore"},
    "EASIER's code: on": {"zero": "on"},
    "EGP's code: off": {"zero": "off", "exclude_saturated": True},
}
for name, options in papers.items():
    layer = activation_entropy.state_entropy(z, **options).item()
    dead = activation_entropy.state_entropy(torch.zeros(4, 4), **options)
    print(f"{name:18} layer {layer:.3f} bits, a dead layer {dead:.3f}")

# %% [markdown]
# They agree on a layer that is dead altogether: 0 bits. They
# differ where some units are dead. For EASIER these make the layer look
# more removable. EGP does not see them: its layer is as undecided as the
# units that are left. Without exact zeros, and without units that never
# switch, all three are one.
#
# ## Maths
#
# Let $z$ be a unit's pre-activation, over all images and, in a
# convolution, all positions. The unit's share of ON and the entropy of a
# layer of $C$ units are
#
# $$\pi_c = P(z_c > 0 \mid z_c \ne 0), \qquad \mathcal{H} =
# -\frac{1}{C} \sum_c \left[ \pi_c \log_2 \pi_c +
# (1 - \pi_c) \log_2 (1 - \pi_c) \right]. \tag{1}$$
#
# TLC looks at no data. Behind a BatchNorm of scale $\gamma$ and bias $b$, a
# channel has mean $b$ and standard deviation $|\gamma|$; if it is Gaussian,
#
# $$\pi_c = \Phi\!\left(\frac{b_c}{|\gamma_c|}\right), \qquad
# \epsilon_c = \Phi\!\left(-\frac{|b_c|}{|\gamma_c|}\right) =
# \min(\pi_c, 1 - \pi_c). \tag{2}$$
#
# $\epsilon$ is the *error likelihood*: how often it is wrong to take the
# unit's usual state for granted. (TLC removes the activation of the layer
# where it is smallest on average, and sets to 0 the channels that are mostly
# OFF, $b_c < 0$.) EGP removes weights and hopes for layers
# to die of it. Of a budget $n$, layer $l$ with entropy $\mathcal{H}_l$ and
# mean size $\overline{|w_l|}$ of its non-zero weights loses
#
# $$n_l = n \cdot \operatorname{softmax}_l\!
# \left(\frac{\sum_j I_j}{I_l}\right), \qquad
# I_l = \mathcal{H}_l \cdot \overline{|w_l|}. \tag{3}$$
#
# A layer that has fewer weights than its share is emptied, and what is left
# of the budget is spread anew over the others.
#
# **What is assumed:** that a unit which is nearly always ON or nearly
# always OFF does nothing in the cases that are left over; that signs tell
# enough, however large $z$ is; and that a layer is as removable as its
# *average* unit.
#
# ## From scratch
#
# Equation (1), and a look at what enters a module. EASIER is then one line:
# the activation of least entropy becomes an identity.


# %%
def share_on(z):  # [B, C, ...] -> [C]
    others = [dim for dim in range(z.dim()) if dim != 1]
    on, off = (z > 0).sum(others), (z < 0).sum(others)
    return on / (on + off).clamp(min=1)  # eq. 1


def entropy(z):
    p = share_on(z)
    nats = torch.special.entr(p) + torch.special.entr(1 - p)  # -p log p
    return (nats / np.log(2)).mean().item()


def inputs_of(model, modules, images):
    found, handles = {}, []
    for name in modules:
        module = model.get_submodule(name)
        handle = module.register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0]})
        )
        handles.append(handle)
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


batch = next(iter(dataset.batches("train", 2_000)))
images = batch[0]
seen = inputs_of(dense[0], names, images)
ours = {name: entropy(z) for name, z in seen.items()}
print(", ".join(f"{name} {bits:.2f}" for name, bits in ours.items()))

# %% [markdown]
# ## The library
#
# The same call from `pruning101`. It counts states batch by batch, so that
# memory does not grow with the number of images. Both agree, and so do the
# first choices of EASIER:

# %%
theirs = activation_entropy.layer_entropies(dense[0], [batch])
gap = max(abs(ours[name] - theirs[name]) for name in names)
assert gap < 1e-4, f"entropies differ by {gap:.1g} bits"
(first,) = activation_entropy.easier(
    dense[0], dataset, removals=1, epochs=0, lr=LR
)
assert first.removed == [min(ours, key=ours.get)]
print("EASIER removes", *first.removed, "first")

# %% [markdown]
# ## Explore
#
# One layer's pre-activations while the network learns, and its units on the
# curve of entropy over the share of ON. Look for two things: how the bell
# behind a norm stays around 0, and how far the square (entropy of the mean
# unit) can be from the dashed line (mean entropy of the units).

# %%
widget.show(state)

# %% [markdown]
# Three settings of the same controls, for those who read without a kernel:

# %% mystnb={"image": {"alt": "Three panels of the classifier's activation relu4: its units as dots on the curve of entropy over the share of ON. Before training nearly all sit at the two feet of the curve, and the mean entropy is near 0; after a few epochs, and more so at the end, they have climbed it on both sides. A square, the entropy of the mean unit, is near the top in all three."}}
fig, axes = plt.subplots(1, 3, figsize=(8.2, 2.9), sharey=True)
for ax, epoch in zip(axes, (0, EPOCHS // 3, EPOCHS), strict=True):
    widget.units(state.on["relu4"][epoch], ax=ax)
    bits = widget.entropies(state.on["relu4"][epoch]).mean()
    ax.set_title(f"relu4 after {epoch} epochs:\nH = {bits:.2f} bits")
    ax.label_outer()
for ax in axes[:2]:
    ax.get_legend().remove()
plt.show()

# %% [markdown]
# If you named `block2.relu2` in the prediction, because most of it is blue:
# the layer as a whole is not what is measured. `relu4` is ON for little
# more than a half, but most of its *units* lean far to ON or far to OFF.
# And there is a trap: before any training hardly one of them switches at
# all. Low entropy does not tell what is superfluous from what has not
# learnt yet.
#
# ## Experiment 1: which layers are decided?
#
# The trained networks, layer by layer. Striped are the two activations that
# stand behind an addition.

# %% mystnb={"image": {"alt": "Bars of the entropy of eight activations with whiskers over seeds. Five bars behind a norm are all within a few hundredths of 1 bit; the two striped ones behind additions are lower, and relu4 in the classifier is the lowest, little above one half."}}
found = [
    activation_entropy.layer_entropies(model, train_batches())
    for model in dense
]
bits = {name: [layers[name] for layers in found] for name in names}
fig, ax = plt.subplots(figsize=(8.2, 2.9))
plots.bars(
    {name: np.mean(values) for name, values in bits.items()},
    spread={name: (min(v), max(v)) for name, v in bits.items()},
    ylabel="entropy (bits)",
    title="Trained networks: mean and range over seeds",
    ax=ax,
)
additions = [name for name in names if name.endswith(".relu2")]
for name, bar in zip(names, ax.patches, strict=True):
    if name in additions:
        bar.set(hatch="///", edgecolor="white")
ax.set_ylim(0, 1.15)
ax.tick_params(axis="x", labelsize="small")
plt.show()

# %% [markdown]
# Behind a norm everything is undecided, for the norm puts the bell around
# its bias, which is near 0. Two kinds stand out: the classifier's, which
# has no norm, and those behind additions. These are no accident:
#
# $$z = F(x) + x, \qquad x = \operatorname{ReLU}(\cdot) \ge 0.$$
#
# The skip can only push to the right. Take it away, and the same branch is
# as undecided as the others:

# %%
for block in ("block1", "block2"):
    found = inputs_of(dense[0], [block, f"{block}.relu2"], images)
    skip, z = found[block], found[f"{block}.relu2"]
    assert skip.min() >= 0
    print(
        f"{block}: branch alone {entropy(z - skip):.2f} bits, "
        f"with its skip {entropy(z):.2f}; the skip adds "
        f"{skip.mean():.2f} on average"
    )

# %% [markdown]
# ## Experiment 2: what would each removal buy?
#
# No training yet. One activation at a time becomes an identity, and `fold`
# of lesson 6 merges what it can: by default where that saves
# multiplications, or (`force`) whatever it costs.

# %%
whole = measure.footprint(fold(dense[0], example).model, example)
rows, worth = {}, []
for name in names:
    linear = masks.clone(dense[0])
    activation_entropy.remove_activations(linear, [name])
    row = {"entropy": f"{np.mean(bits[name]):.2f}"}
    for label, force in {"": False, ", forced": True}.items():
        report = fold(linear, example, force=force)
        size = measure.footprint(report.model, example)
        row[f"depth{label}"] = f"{whole.depth} -> {size.depth}"
        row[f"MACs{label}"] = f"{size.macs / whole.macs - 1:+.0%}"
        if size.macs < whole.macs and not force:
            worth.append(name)
    rows[name] = row
print(pd.DataFrame(rows).T.sort_values("entropy").to_string())
print("worth removing:", ", ".join(worth))

# %% [markdown]
# Read it from the top, as EASIER would. The two additions come early, and
# nothing follows: **behind an addition stands a sum, not a layer.** What
# it gives goes to the next convolution *and* to the next skip; there is no
# pair to merge. (`relu1` is read in two places as well, and behind `relu3`
# there is pooling.) Inside a block there is a pair, two 3x3 kernels that
# make one of 5x5: shallower, and dearer. Only the two behind layers that
# *widen* pay. One of them has the lowest entropy of all; of the other,
# entropy knows nothing.
#
# ## Experiment 3: entropy without data
#
# TLC's closed form, equation (2), against what is counted on all training
# images, one point a channel. On the right, the mean error likelihood of
# each layer: the smaller, the earlier it goes.

# %% mystnb={"image": {"alt": "Left, share of ON counted over the share from the norm, with a diagonal: channels behind a norm lie close to it, channels behind an addition lie above it. Right, error likelihood by layer, from the norm and as counted: alike for most layers, but behind additions the counted one is lower."}}
closed, counted = {}, {}
for name, origin in activation_states.origins(dense[0], example).items():
    if origin.norm is not None:
        norm = dense[0].get_submodule(origin.norm)
        closed[name] = activation_entropy.norm_state_probability(norm)
        counted[name] = share_on(seen[name])
fig, (left, right) = plt.subplots(
    1, 2, figsize=(8.2, 3.1), width_ratios=(1, 1.3)
)
for label, chosen in {
    "behind a norm": [name for name in closed if name not in additions],
    "behind an addition": additions,
}.items():
    plots.scatter(
        torch.cat([closed[name] for name in chosen]),
        torch.cat([counted[name] for name in chosen]),
        xlabel="share ON, from the norm",
        ylabel="share ON, counted",
        label=label,
        diagonal=chosen is additions,
        ax=left,
    )
for i, (label, shares) in enumerate(
    {"from the norm": closed, "counted": counted}.items()
):
    likely = [torch.minimum(p, 1 - p).mean() for p in shares.values()]
    right.plot(
        likely,
        list(shares),
        linestyle="",
        marker=plots.MARKERS[i],
        color=plots.PALETTE[i],
        label=label,
    )
right.set(xlabel="error likelihood", xlim=(0, 0.55))
right.invert_yaxis()
right.legend(loc="lower left")
plt.show()

# %% [markdown]
# Behind a norm the two differ by less than a tenth, for the bells are not
# quite Gaussian. Behind an addition the formula sees the branch, not the skip,
# and takes the units for more undecided than they are. (Where there is no
# norm, as before `relu4`, TLC takes mean and deviation of the inputs
# themselves.)
#
# ## Experiment 4: the race
#
# All begin with the same dense networks and train for equally many epochs in
# all. EASIER, TLC and *by lot* remove one activation a round; EGP and
# NEPENTHE, in half as many rounds of twice the length, half of the weights
# that are left. *By lot* takes the activations in random order. *Nothing*
# trains on for as long and keeps all. *What merges* removes those that
# experiment 2 found worth it, and stops.
#
# EGP and NEPENTHE may only touch the residual blocks here. Elsewhere an
# emptied layer is the end: nothing gets past it (pitfall 3).


# %% mystnb={"image": {"alt": "Two panels over the number of activations removed, from 0 to 8. Left, test accuracy of EASIER, TLC and random order: all stay high until most activations are gone, fall somewhat, and with all eight gone are near chance. Right, multiplications of the folded network: flat for most removals, with one large step down where relu2 goes, at a different place for each order."}}
ROUNDS = {"epochs": RETRAIN, "lr": LR, "retrain": SETTINGS}
BLOCKS = [name for name in names if name.startswith("block")]


def in_order(model, seed, order):
    """Remove these activations, one a round, and retrain."""
    model = masks.clone(model)
    for index, name in enumerate(order, start=1):
        start = time.perf_counter()
        activation_entropy.remove_activations(model, [name])
        trained(100 * seed + index, model, RETRAIN)
        seconds = time.perf_counter() - start
        step = steps.measured(index, name, model, dataset, seconds=seconds)
        small = fold(model, example).model
        yield replace(step, footprint=measure.footprint(small, example))


def by_lot(model, seed):
    order = np.random.default_rng(seed).permutation(names)
    return in_order(model, seed, [str(name) for name in order])


def recipe(run, **options):
    options = ROUNDS | options
    return lambda model, seed: run(model, dataset, seed=seed, **options)


# half as many rounds of twice the length: the same epochs in all
some = {"rounds": len(names) // 2, "epochs": 2 * RETRAIN, "layers": BLOCKS}
race = {
    "EASIER": recipe(activation_entropy.easier),
    "TLC": recipe(activation_entropy.tlc),
    "by lot": by_lot,
    "EGP": recipe(activation_entropy.egp, **some),
    "NEPENTHE": recipe(activation_entropy.nepenthe, **some),
    "what merges": lambda model, seed: in_order(model, seed, worth),
}
runs = {
    name: [list(run(model, seed)) for seed, model in enumerate(dense)]
    for name, run in race.items()
}

fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.2))
one_a_round = ("EASIER", "TLC", "by lot")
places = range(len(names) + 1)
start = [accuracy(model) for model in dense]
lines, costs = {}, {}
for name in one_a_round:
    lines[name] = (
        places,
        [
            [start[seed], *(step.test_accuracy for step in run)]
            for seed, run in enumerate(runs[name])
        ],
    )
    costs[name] = (
        places,
        [
            [100, *(100 * step.footprint.macs / whole.macs for step in run)]
            for run in runs[name]
        ],
    )
BUDGET = RETRAIN * len(names)  # epochs of a whole run
nothing = [
    trained(seed, masks.clone(model), BUDGET)
    for seed, model in enumerate(dense)
]
plots.curves(
    lines,
    xlabel=f"activations removed (of {len(names)})",
    ylabel="test accuracy",
    title="Mean and range over seeds",
    reference=("nothing removed", np.mean([accuracy(m) for m in nothing])),
    ax=left,
)
left.legend(loc="lower left")
plots.curves(
    costs,
    xlabel=f"activations removed (of {len(names)})",
    ylabel="MACs once folded (%)",
    title="What it bought",
    ax=right,
)
right.set_ylim(0, 108)
right.get_legend().remove()
plt.show()
for name in one_a_round[:2]:
    gone = [step.linearised for step in runs[name][0]]
    print(f"{name}, seed 0:", ", ".join(name for (name,) in gone))

# %% [markdown]
# **Left.** Most activations can go, in almost any order: retraining repairs
# it. The last one cannot, for without it the network is linear and near
# chance, as promised. In between, what a method chose shows late: not every
# activation can carry the network alone, and the lot sometimes leaves one
# that cannot. The dotted network lost nothing and only trained on, for as
# long as the whole run. **Right.** After the small step for `relu4`,
# removals buy nothing at all until `relu2` goes, and its entropy says to
# keep it. The lot, which knows nothing, takes it sooner.
#
# ## Experiment 5: stop in time, and add up
#
# How far may each go? We take the last round whose accuracy **on valid**,
# mean over seeds, is at most two points below that of the dense networks.
# (With `tolerance=0.02` a recipe stops by itself, at the first round that
# is too low.) What comes out trains on until all have had equally many
# epochs, and is folded. *Cut* is the accuracy with the same activations
# taken from the dense network and nothing retrained, *there* that of the
# round, *trained on* the final one.

# %% tags=["table"]
TOLERANCE = 0.02
floor = np.mean([accuracy(m, "valid") for m in dense]) - TOLERANCE


def reach(name):
    """The last round whose accuracy on valid is high enough, from 1."""
    on_valid = np.mean([[s.accuracy for s in run] for run in runs[name]], 0)
    return max(
        [i + 1 for i, v in enumerate(on_valid) if v >= floor], default=0
    )


def folded(model):
    plain = masks.clone(model).eval()
    masks.make_permanent(plain)  # EGP and NEPENTHE leave masks
    return fold(plain, example).model


def summary(name):
    """One row of the table, and the first seed's folded network."""
    rounds = reach(name) if name in runs else 0
    each = 2 if name in ("EGP", "NEPENTHE") else 1
    spent = each * RETRAIN * rounds
    to_go = 0 if name == "dense" else BUDGET - spent
    found, cut, stopped, test, small = [], [], [], [], []
    for seed, model in enumerate(dense):
        kept = runs[name][seed][:rounds] if rounds else []
        end = kept[-1].model if kept else model
        left = structure.activations(end)
        gone = [activation for activation in names if activation not in left]
        linear = masks.clone(model)
        activation_entropy.remove_activations(linear, gone)
        cut.append(accuracy(linear))
        stopped.append(accuracy(end))
        if to_go:
            end = trained(seed, masks.clone(end), to_go)
        small.append(folded(end))
        test.append(accuracy(small[-1]))
        size = measure.footprint(small[-1], example)
        found.append(
            {
                "activations gone": len(gone),
                "parameters": size.parameters,
                "non-zero": size.nonzero,
                "MACs": size.macs,
                "depth": size.depth,
                "coded bytes": size.coded_bytes,
                "dense bytes": size.dense_bytes,
                "epochs to there": spent,
                "seconds to there": sum(step.seconds for step in kept),
            }
        )
    row = {
        key: f"{mean:,.0f}" if mean > 100 else f"{mean:.1f}"
        for key, mean in pd.DataFrame(found).mean().items()
    }
    row["accuracy, cut"] = f"{np.mean(cut):.1%}"
    row["there"] = f"{np.mean(stopped):.1%}"
    row["trained on"] = f"{np.mean(test):.1%}"
    row["range"] = f"{100 * min(test):.0f}-{100 * max(test):.0f} %"
    return row, small[0]


summaries = {name: summary(name) for name in ("dense", *race, "nothing")}
clock = {
    batch: relative_latency(
        [small for _, small in summaries.values()], example[:batch]
    )
    for batch in (1, 64)
}
for i, (row, _) in enumerate(summaries.values()):
    row["latency, batch 1 / 64"] = f"{clock[1][i]:.2f} / {clock[64][i]:.2f}"
table = pd.DataFrame({name: row for name, (row, _) in summaries.items()})
print(table.iloc[:, :4].to_string(), "\n")
print(table.iloc[:, 4:].to_string())

# %% [markdown]
# Compare *EASIER* with *what merges*: trained equally long, one without most
# of its activations and with nearly all of its multiplications, the other
# without two and with much less of everything, and as accurate within the
# spread of the seeds. And compare all with *nothing*: training on is worth
# something by itself. *Cut* tells what entropy finds: not what the network
# does not use, but what retraining can replace.
#
# EGP and NEPENTHE empty layers of a block, but an empty layer is multiplied
# as before, until `structured.materialise` of lesson 5 takes it out. And it
# was we who built a wide pair into this network. Where there is none, as in
# a ResNet-18, no removal saves a multiplication.
#
# ## The paper's setting
#
# EASIER's own table for ResNet-18 on CIFAR-10, 160 epochs for each removal,
# and the comparison in the paper of lesson 9, LaCoOT: its 90.35 for EASIER
# is what that table has at 9 of 17. Below it ours, from `results/`, made by
# `benchmarks/activation_entropy.py`.

# %%
print("EASIER, ResNet-18 on CIFAR-10: removed of 17, and test accuracy in %")
print("  0: 92.47   8: 92.10   9: 90.35   12: 84.52")
compared = {
    "plain training": (91.77, "140.19 M", 30),
    "EGP": (90.64, "140.19 M", 376),
    "NEPENTHE": (89.26, "140.19 M", 288),
    "EASIER": (90.35, "140.19 M", 533),
}
print("LaCoOT's comparison, the same network and data")
print(
    pd.DataFrame(
        compared, index=["accuracy, %", "MACs", "minutes of training"]
    ).T.to_string(),
    "\n",
)
path = material.material() / "results" / "activation_entropy.json"
if path.is_file():
    for found in json.loads(path.read_text())["settings"].values():
        last = {row["method"]: row for row in found["summary"]}
        whole_macs = last["plain"]["macs_folded"]["mean"]
        table = {}
        for name, row in last.items():
            test = {k: 100 * v for k, v in row["test_accuracy"].items()}
            table[name] = {
                "epochs": row["epochs"],
                "gone": f"{row['removed']['mean']:.1f}",
                "depth": f"{row['depth_folded']['mean']:.1f}",
                "MACs": f"{row['macs_folded']['mean'] / whole_macs:.0%}",
                "forced": f"{row['macs_forced']['mean'] / whole_macs:.0%}",
                "test, %": f"{test['mean']:.1f}",
                "range": f"{test['least']:.1f}-{test['greatest']:.1f}",
                "seconds": f"{row['seconds']['mean']:.0f}",
            }
        print(f"{found['dataset']}, {found['network']}:")
        print(
            f"{found['activations']} activations, "
            f"{len(found['seeds'])} seed(s), after the last round"
        )
        print(pd.DataFrame(table).T.to_string(), "\n")
else:
    print("results/activation_entropy.json is not here: run the benchmark")

# %% [markdown]
# In the comparison the MACs are the same in all rows: whatever was removed,
# no layer was. The published codes merge nothing, and in a ResNet-18 there is
# nothing that would pay. What differs is the accuracy, which is lower, and
# the time, about ten to eighteen times that of plain training. (Why the two
# papers begin with 92.47 and 91.77 is not said.)
#
# Ours show both ends. In a plain chain every activation stands between two
# layers, so every removal merges, and the MACs fall to well under a half.
# Of those that remove some, entropy and learned slopes (lesson 6) do best
# there; the lot and TLC's two rankings lose more, in some seeds or in all;
# plain training stays ahead. In the ResNet-20 (mind how few seeds) a quarter
# of the activations goes for nothing: where merging must pay nothing merges,
# forced it gets dearer, and the lot does about as well as entropy.
# EGP and NEPENTHE were stopped early in the chain, where an emptied layer
# cuts the network; in the ResNet-20 they emptied many, and much of the
# accuracy went with them.
#
# ## Pitfalls
#
# 1. **The entropy of the mean is not the mean of the entropies.** All four
#    count a unit's states over all positions first. Position by position,
#    the same noise is less undecided, the more so the smaller the batch.
# 2. **An activation removed is not a layer removed.** Ask for the depth,
#    and for the MACs.
# 3. **A softmax of large numbers picks one.** The exponents of equation (3)
#    lie around the number of layers, and one more is a factor of 2.7: nearly
#    all of the budget falls on one or two. Where no skip leads around an
#    emptied layer, the network is dead.
# 4. **Picking the number of removals on test flatters.** Pick it on valid.
# 5. **Fold last.** Folding takes the norms along, and what trained well
#    with them may not train at all without, at the same learning rate.

# %%
noise = torch.randn(16, 64, 8, 8, generator=torch.Generator().manual_seed(0))
at_each_place = activation_entropy.state_entropy(noise.flatten(1))
print(f"1. H of mean p {entropy(noise):.4f}, mean H {at_each_place:.4f}")
step = runs["EASIER"][0][reach("EASIER") - 1]
print(
    f"2. {step.index} of {len(names)} activations gone: depth "
    f"{whole.depth} -> {step.footprint.depth}, "
    f"MACs {step.footprint.macs / whole.macs - 1:+.0%}"
)
for step in activation_entropy.egp(dense[0], dataset, rounds=4, **ROUNDS):
    if step.index == 1:
        alive = {
            name: dense[0].get_submodule(name).weight.numel()
            for name in step.scores
        }
        lost = activation_entropy.weight_budgets(
            step.scores, alive, step.removed
        )
        told = ", ".join(f"{n} of {name}" for name, n in lost.items() if n)
        print(f"3. {step.removed} weights go: {told}")
    print(
        f"   round {step.index}: {step.test_accuracy:.0%} right, emptied:",
        ", ".join(step.linearised) or "nothing",
    )
for split, key in {"test": "test_accuracy", "valid": "accuracy"}.items():
    picked = [
        max(run[-4:], key=lambda step: getattr(step, key))
        for run in runs["by lot"]
    ]
    told = np.mean([step.test_accuracy for step in picked])
    print(
        f"4. by lot, best of the last four rounds on {split}: "
        f"{told:.1%} on test"
    )
end = runs["what merges"][0][-1].model
for name, model in {
    "as it is": masks.clone(end),
    "folded": folded(end),
}.items():
    trained(0, model, RETRAIN)
    print(f"5. {name}, trained on: {accuracy(model):.0%}")

# %% [markdown]
# What published code really did, and ours does not by default:
#
# - TLC's paper ranks by equation (2). Its code computes that and does not
#   use it: it ranks by how much the loss of **one** validation batch rises
#   without the activation (`ranking="loss_gap"`), and where removals lower
#   it, adds more until the set as a whole hurts, and keeps that set.
# - EASIER's code counts zeros as ON, and averages the entropies of the last
#   epoch's batches, with weights that move and augmentation on.
# - EGP's code, on its own ResNet-18, finds the layer to prune by replacing
#   *relu* in a name, and so only ever prunes the first of nine.
# - None of the three stops by what was lost on valid (TLC's ends below 20 %
#   there, or at the last activation), and none merges anything.
#
# ## Exercises
#
# ### Exercise 1: many batches, one entropy
#
# *Easy · 15 minutes · core.* Pre-activations come in batches of [B, C] or
# [B, C, H, W], of different sizes. Return the layer's entropy in bits, as a
# float, **as if all images had come at once**: zeros are in neither state,
# a unit that is always 0 has entropy 0, and all units count. `batches` can
# be read once, and does not fit into memory.
#
# <details><summary>Hint 1</summary>The mean of the batches' entropies is
# another number. What can be added up are counts.</details>
# <details><summary>Hint 2</summary>Two integers a unit are enough; after
# the last batch, make entropies of them.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-07-1", "grade": false, "solution": true, "locked": false, "task": false}
def entropy_of_batches(batches):
    """Mean entropy in bits of the units' states over all batches."""
    ### BEGIN SOLUTION
    on, off = 0, 0
    for z in batches:
        others = [dim for dim in range(z.dim()) if dim != 1]
        on = on + (z > 0).sum(others)
        off = off + (z < 0).sum(others)
    p = on / (on + off).clamp(min=1)
    nats = torch.special.entr(p) + torch.special.entr(1 - p)
    return (nats / np.log(2)).mean().item()
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-1-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
z = torch.tensor([[1.0, 2, 0, 0], [-1, 1, 0, 0], [3, 4, 0, 2], [-2, 1, 0, -1]])
found = entropy_of_batches(iter([z]))
assert isinstance(found, float), f"a float, not {type(found).__name__}"
assert abs(found - 0.5) < 1e-6, f"by hand it was 0.5 bits, not {found:.3f}"
found = entropy_of_batches(iter([z[:, :, None, None].expand(4, 4, 2, 3)]))
assert abs(found - 0.5) < 1e-6, f"the same at all positions, not {found:.3f}"
### BEGIN HIDDEN TESTS
assert entropy_of_batches(iter([torch.zeros(3, 5)])) == 0.0, "a dead layer"
assert entropy_of_batches(iter([torch.ones(3, 5)])) == 0.0, "a layer of wires"
quarter = torch.tensor([[1.0], [1], [1], [-1]])
found = entropy_of_batches(iter([quarter]))
assert abs(found - 0.811278) < 1e-5, "three of four are ON: 0.811 bits"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-1-check-b", "grade": true, "points": 2, "solution": false, "locked": true, "task": false}
apart = [torch.tensor([[1.0], [2]]), torch.tensor([[-3.0], [-1]])]
found = entropy_of_batches(iter(apart))
assert abs(found - 1) < 1e-6, (
    f"ON twice, OFF twice: 1 bit, whatever the batches; got {found:.3f}"
)
### BEGIN HIDDEN TESTS
generator = torch.Generator().manual_seed(0)
for shape in ((6,), (6, 3, 4)):
    batches = [
        torch.randn(n, *shape, generator=generator).round() + 0.3 * (n > 3)
        for n in (7, 1, 4, 30)
    ]
    for z in batches:
        z[:, 2] = 0  # a dead unit
    at_once = activation_entropy.state_entropy(torch.cat(batches)).item()
    found = entropy_of_batches(iter(batches))
    assert abs(found - at_once) < 1e-5, "not that of all images at once"


def watched(n):
    given = []
    for _ in range(n):
        z = torch.ones(5, 2)
        given.append(weakref.ref(z))
        yield z
        del z
        held = sum(reference() is not None for reference in given)
        assert held < 3, f"{held} batches are in memory: keep counts of them"


assert entropy_of_batches(watched(9)) == 0.0
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise 2: wrong how often?
#
# *Easy · 10 minutes · core.* Equation (2) from a norm's scales and biases,
# two tensors [C]: return the error likelihood of each channel. Scales may
# be negative. Where the scale is 0 nothing varies, and nothing can go
# wrong: return 0, even if the bias is 0 as well.
#
# <details><summary>Hint</summary>torch.special.ndtr is the normal
# distribution's function, and torch.where picks.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-07-2", "grade": false, "solution": true, "locked": false, "task": false}
def wrong_how_often(scale, bias):
    """Error likelihood of each channel behind a norm, [C]."""
    ### BEGIN SOLUTION
    size = scale.abs()
    fixed = size == 0
    likely = torch.special.ndtr(-bias.abs() / size.masked_fill(fixed, 1))
    return torch.where(fixed, torch.zeros_like(likely), likely)
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-2-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
found = wrong_how_often(torch.tensor([1.0, 2]), torch.tensor([0.0, -2]))
assert found.shape == (2,), f"one value a channel, not {tuple(found.shape)}"
assert abs(found[0] - 0.5) < 1e-6, f"bias 0: wrong half the time; {found[0]}"
assert abs(found[1] - 0.1587) < 1e-4, (
    f"one deviation away from 0: wrong in 15.87 %, not {found[1]:.2%}"
)
### BEGIN HIDDEN TESTS
generator = torch.Generator().manual_seed(0)
for channels in (1, 6, 50):
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels, generator=generator))
        norm.bias.copy_(torch.randn(channels, generator=generator))
    found = wrong_how_often(norm.weight.detach(), norm.bias.detach())
    expected = activation_entropy.error_likelihood(norm)
    assert torch.allclose(found, expected, atol=1e-5), "not equation (2)"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-2-check-b", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
scale, bias = torch.tensor([0.0, 0, 0, -2]), torch.tensor([0.0, 3, -3, 2])
found = wrong_how_often(scale, bias)
assert not found.isnan().any(), f"0 / 0 is no likelihood: {found.tolist()}"
assert found[:3].tolist() == [0, 0, 0], f"scale 0: 0, not {found.tolist()}"
assert found[3] < 0.5, f"a scale of -2 varies as much as 2: {found[3]:.2f}"
### BEGIN HIDDEN TESTS
assert abs(found[3] - 0.1587) < 1e-4, "the sign of the scale must not matter"
flat = wrong_how_often(torch.zeros(4), torch.zeros(4))
assert flat.tolist() == [0.0] * 4, "scale and bias 0: 0"
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise 3: EGP's shares
#
# *Medium · 15 minutes · core.* Equation (3) without the budget: from the
# importances $I_l$ of the layers, [layers], return the share that each
# gets. Layers with $I_l = 0$ do not take part (their share is 0, and they
# do not count in the sum); at least one does. Mind large exponents.
#
# <details><summary>Hint 1</summary>torch.softmax subtracts the largest
# exponent before it takes any exponential.</details>
# <details><summary>Hint 2</summary>An exponent of minus infinity gives a
# share of 0.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-07-3", "grade": false, "solution": true, "locked": false, "task": false}
def shares_of_budget(importance):
    """Share of the budget of weights that each layer gets, [layers]."""
    ### BEGIN SOLUTION
    there = importance > 0
    exponent = torch.full_like(importance, -torch.inf)
    exponent[there] = importance.sum() / importance[there]
    return exponent.softmax(0)
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-3-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
found = shares_of_budget(torch.tensor([0.25, 0.25, 0.5]))
assert abs(found.sum() - 1) < 1e-5, f"shares add up to 1, not {found.sum()}"
assert found.argmin() == 2, "the most important layer must lose least"
expected = [0.468311, 0.468311, 0.063379]
assert torch.allclose(found, torch.tensor(expected), atol=1e-4), (
    f"exponents 4, 4, 2 give {expected}, not {found.tolist()}"
)
### BEGIN HIDDEN TESTS
for seed in range(5):
    generator = torch.Generator().manual_seed(seed)
    importance = 0.5 + torch.rand(6, generator=generator)
    layers = {str(i): float(v) for i, v in enumerate(importance)}
    counts = activation_entropy.weight_budgets(
        layers, dict.fromkeys(layers, 10**7), 10**6
    )
    expected = torch.tensor(list(counts.values())) / 10**6
    found = shares_of_budget(importance)
    assert torch.allclose(found, expected, atol=1e-4), "not equation (3)"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-3-check-b", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
found = shares_of_budget(torch.tensor([1e-4, 0.5, 0.0, 0.5]))
assert not found.isnan().any(), f"an exponential overflowed: {found.tolist()}"
assert found.shape == (4,), f"four layers, but {len(found)} shares"
assert found[2] == 0, f"a layer without importance gets {found[2]}, not 0"
assert found[0] > 0.999, "the least important layer gets all of it"
### BEGIN HIDDEN TESTS
found = shares_of_budget(torch.tensor([0.0, 0.3, 0.0, 0.3]))
assert found.tolist() == [0.0, 0.5, 0.0, 0.5], "zeros do not take part"
given = torch.tensor([0.2, 0.0])
assert shares_of_budget(given).tolist() == [1.0, 0.0]
assert torch.equal(given, torch.tensor([0.2, 0.0])), "input was changed"
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise 4: is it worth removing?
#
# *Hard · 25 minutes.* `structure.linear_chains(model, example)` gives the
# runs of modules that simply follow one another, as lists of names. Return
# the names of the activations whose removal lets two layers **merge**: in
# the run there is a layer with weights before it and one behind it, and
# nothing else between these two but norms, dropout and `nn.Identity`. Keep
# the order of the runs. (Whether the merge pays is another question.)
#
# <details><summary>Hint 1</summary>`structure.activations(model)` and
# `structure.prunable(model)` are dictionaries by name.</details>
# <details><summary>Hint 2</summary>Take transparent modules out of the run
# first. Then look at the neighbours of each activation.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-07-4", "grade": false, "solution": true, "locked": false, "task": false}
def worth_removing(model, example):
    """Names of the activations between two layers that could then merge."""
    ### BEGIN SOLUTION
    transparent = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Identity)
    acting, layers = structure.activations(model), structure.prunable(model)
    found = []
    for chain in structure.linear_chains(model, example):
        run = [
            name
            for name in chain
            if not isinstance(model.get_submodule(name), transparent)
        ]
        for before, name, after in zip(run, run[1:], run[2:], strict=False):
            if name in acting and before in layers and after in layers:
                found.append(name)
    return found
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-4-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
plain = nn.Sequential(
    nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()
).eval()
found = worth_removing(plain, torch.zeros(2, 4))
assert isinstance(found, list), f"a list of names, not {type(found).__name__}"
assert found == ["2"], (
    f"'2' stands between two layers, behind '4' there is none; got {found}"
)
### BEGIN HIDDEN TESTS
deep = nn.Sequential(
    OrderedDict(
        a=nn.Conv2d(1, 2, 3),
        f=nn.ReLU(),
        pool=nn.AvgPool2d(2),
        b=nn.Conv2d(2, 2, 3),
        g=nn.ReLU(),
        norm=nn.BatchNorm2d(2),
        drop=nn.Dropout(),
        gone=nn.Identity(),
        c=nn.Conv2d(2, 2, 1),
        h=nn.ReLU(),
        k=nn.GELU(),
        d=nn.Conv2d(2, 2, 1),
        m=nn.GELU(),
        e=nn.Conv2d(2, 2, 1),
    )
).eval()
found = worth_removing(deep, torch.zeros(2, 1, 12, 12))
assert found == ["g", "m"], "pooling, or a second activation, stands between"
assert worth_removing(nn.Sequential(nn.ReLU()), torch.zeros(2, 4)) == []
pooled = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(2), nn.Conv2d(2, 1, 1))
found = worth_removing(pooled.eval(), torch.zeros(2, 1, 4, 4))
assert found == [], f"pooling is no activation: got {found}"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-4-check-b", "grade": true, "points": 2, "solution": false, "locked": true, "task": false}
block = models.BasicBlock(2, 2, 1).eval()
found = worth_removing(block, torch.zeros(2, 2, 6, 6))
assert found == ["relu1"], (
    f"behind an addition stands a sum, not a layer: got {found}"
)
### BEGIN HIDDEN TESTS
blocks = nn.Sequential(*[models.BasicBlock(2, 2, 1) for _ in range(3)]).eval()
found = worth_removing(blocks, torch.zeros(2, 2, 6, 6))
assert found == ["0.relu1", "1.relu1", "2.relu1"], "in three blocks"
### END HIDDEN TESTS

# %% [markdown]
# ### Open question
#
# With most of its activations removed, a network keeps its accuracy after
# retraining. Were these activations superfluous all along, or only once the
# network had been trained *with* them? Say what you expect, and how you
# would find out fairly.

# %% [markdown] tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-07-open", "grade": true, "points": 2, "solution": true, "locked": false, "task": false}
# Train the reduced network from a new initialisation, without these
# activations from the first step, for as many epochs as the dense training
# and all rounds took together, over several seeds, and stop by valid. If it
# comes as far, the removal found nothing but a shape, and the hours went
# into a search that one training could have replaced; as baselines the same
# number of activations removed by lot, retrained and from the start. If it
# does not, the activations helped to find weights that are good without
# them, as a teacher does. Judged by the race, one expects the order of
# removal to matter little, except for which activation is the last.

# %% [markdown]
# ## Self-check
#
# <details><summary>1. A layer has entropy 0. Is its activation
# superfluous?</summary>
# On the images that were looked at, each unit is a wire or dead. Identity in
# its place is exact for the wires only: a unit that was always OFF gave 0,
# and now gives z.</details>
#
# <details><summary>2. EASIER removes the activation behind a residual
# addition. What can be merged?</summary>
# Nothing: before it stands a sum, behind it a convolution and the next
# skip.</details>
#
# <details><summary>3. A method needs 160 epochs for each of nine removals.
# What should it be compared with?</summary>
# With the dense network trained for nine times 160 epochs more, with
# removals in random order, and with a network that has the reduced shape
# from the start.</details>
#
# ## Recap
#
# - A unit that is always ON is a wire, one that is always OFF is a hole;
#   entropy counts how far a layer is from either, with or without data.
# - Most activations can go if the rest is retrained, in nearly any order:
#   retraining does the work, and it is what the methods cost.
# - An activation removed buys nothing until two layers merge and the merge
#   is cheaper. Ask which ones merge before you ask which one decides least.
#
# | method | removes | score | looks at data | makes it really smaller |
# | --- | --- | --- | --- | --- |
# | skeletonization | units | slope of the error | yes | yes |
# | optimal brain damage | weights | $h u^2/2$ | yes | no (zeros) |
# | magnitude pruning | weights | size | no | only dead units |
# | lottery ticket | weights, before training | trained size | by training | only dead units |
# | SNIP, GraSP, SynFlow | weights, before training | eq. (3), lesson 4 | one batch; SynFlow none | only dead units |
# | LOBSTER, SeReNe | weights; units | size, after shrinking | yes | only dead units |
# | 2:4 | two weights of four | size | no | on some GPUs |
# | channel pruning | groups of channels | norm over the group | no | yes |
# | layer folding | activations | learned slope | by training | where merging pays |
# | EGP, NEPENTHE | weights, until layers are empty | entropy times size | yes | only what is empty |
# | EASIER | activations | entropy of states | yes | where merging pays |
# | TLC | activations | error likelihood | no, with norms | where merging pays |
#
# Next: lesson 8, LayerCollapse, chooses the pairs first, those that pay,
# and trains until they can merge.
#
# ## References
#
# - Z. Liao, V. Quétu, V.-T. Nguyen, E. Tartaglione, *Can Unstructured
#   Pruning Reduce the Depth in Deep Neural Networks?*, ICCV workshops 2023.
#   Read how entropy and weight size become one budget (EGP).
# - Z. Liao, V. Quétu, V.-T. Nguyen, E. Tartaglione, *NEPENTHE: Entropy-Based
#   Pruning as a Neural Network Depth's Reducer*, 2024. Read the definition
#   of the three states.
# - V. Quétu, Z. Liao, E. Tartaglione, *The Simpler The Better: An
#   Entropy-Based Importance Metric To Reduce Neural Networks' Depth*, ECML
#   PKDD 2024. Read algorithm 1, and the appendix's tables over the number
#   of removals (EASIER).
# - Z. Liao, N. Hezbri, V. Quétu, V.-T. Nguyen, E. Tartaglione, *Till the
#   Layers Collapse: Compressing a Deep Neural Network through the Lenses of
#   Batch Normalization Layers*, AAAI 2025. Read how the error likelihood
#   follows from a norm.
# - V. Quétu, N. Hezbri, E. Tartaglione, *LaCoOT: Layer Collapse through
#   Optimal Transport*, 2024. Read the table that compares the methods of
#   this lesson by MACs and by training time.
