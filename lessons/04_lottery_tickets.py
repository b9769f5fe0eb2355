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
# # Lottery tickets, and the race to prune at initialisation
#
# reading: 35 minutes · compute: about 1 minute ·
# before: lesson 3 ·
# paper: Frankle & Carbin 2019
#
# If a tenth of the weights is enough in the end, why train the other nine
# tenths at all? Tried naively it fails: a small network trained from scratch
# is usually worse and slower. In 2019 Jonathan Frankle and Michael Carbin
# found what had been missing: the survivors must start **from the initial
# values that they had**. Then they train alone, as well and as fast. Such a
# sub-network is a *winning ticket*. They found theirs by training the large
# network first, and so a race began for ways to see the winners before.
#
# ## You will be able to
#
# 1. **count** what a search leaves in each layer, round by round
#    (exercise 1);
# 2. **rewind** a trained network to a ticket without the two mistakes that
#    are easily made (exercise 2);
# 3. **score** an untrained network without any data, and check the score by
#    what it conserves (exercise 3);
#
# and to say what a ticket saves, and what it does not.
#
# ## Set-up

# %% tags=["setup"]
import json
import sys
from collections import OrderedDict

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", "install -q pruning101")

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch import nn

from pruning101 import lottery_tickets, magnitude
from pruning101 import pruning_at_initialisation as at_init
from pruning101.core import data, masks, measure, models, plots, training
from pruning101.course import material
from pruning101.widgets import lottery_tickets as widget

torch.manual_seed(0)
torch.set_num_threads(1)  # small networks: more only get in each other's way
plots.use_style()
pd.set_option("display.width", 79)

# %% tags=["parameters"]
PROFILE = "quick"  # "standard": MNIST, an hour; "paper": 50,000 iterations

# %% [markdown]
# Training is counted in *iterations* (steps of the optimiser) here, because
# the question is **when** a network is at its best. The digits alone are
# too easy to see it: every network is soon right, and stays right. So on
# the quick profile each pixel gets noise, in train, valid and test alike.
# Networks then overfit, and the loss on `valid` has a lowest point: its
# iteration is the *early stop*. The settings were found on seeds that are
# not shown below.

# %%
NAME, NOISE, SEEDS, ROUNDS, TRAINING = {
    "quick": (
        "digits",
        64,  # standard deviation, of 255 grey levels
        3,
        14,
        {
            "iterations": 300,
            "optimizer": "sgd",  # with momentum 0.9
            "lr": 0.05,
            "evaluate_every": 10,
        },
    ),
    "standard": ("mnist", 0, 2, 14, {"iterations": 4000}),
    "paper": ("mnist", 0, 5, 14, {"iterations": 50_000}),
}[PROFILE]
ITERATIONS = TRAINING["iterations"]


def noisy(split, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE * torch.randn(split.images.shape, generator=generator)
    return (split.images + noise).clamp(0, 255).byte(), split.labels


clean = data.load(NAME)
splits = (clean.train, clean.valid, clean.test)
dataset = data.from_tensors(
    f"{NAME} with noise" if NOISE else NAME,
    *(noisy(split, seed) for seed, split in enumerate(splits)),
    classes=clean.classes,
)
example, _ = next(iter(dataset.batches("valid", 64)))


def untrained(seed):
    size = dataset.train.images.shape[-1]
    return models.build(
        "lenet_300_100", in_channels=1, image_size=size, seed=seed
    )


def train(model, seed):
    """A copy of the model, trained and watched on the way."""
    return lottery_tickets.train(
        model, dataset, seed=seed, progress=False, **TRAINING
    )


dense = train(untrained(0), 0)
count = sum(s.numel() for s in magnitude.scores(dense.model).values())
print(f"lenet_300_100 on {dataset.name}: {count:,} weights")
print(
    f"one training: least loss on valid at iteration {dense.early_stop}, "
    f"test accuracy there {dense.accuracy_at_early_stop:.1%}"
)

# %% [markdown]
# ## Intuition
#
# Every dot is a weight of the first layer: where it *began*, and where
# training *took* it. Magnitude pruning looks along the vertical axis and
# keeps the largest fifth (blue). *Rewinding* puts the blue ones back to
# where they came from. So the mask knows something about training, while
# the values are those of the first day.
#
# **Predict before you run on:** the blue weights are trained again, alone.
# Will they get as far as the whole network? Sooner or later than it? And
# what if they start from *other* random values, or if as many weights are
# chosen by lot?

# %% mystnb={"image": {"alt": "Scatter plot of the weights of layer fc1, initial value across and trained value up, along the diagonal with some spread. A grey band around zero height is pruned; the blue dots above and below it are kept, most of them far from zero on both axes."}}
first = untrained(0).fc1.weight.detach().flatten().numpy()
last = dense.model.fc1.weight.detach().flatten().numpy()
threshold = np.quantile(np.abs(last), 0.8)
kept = np.abs(last) >= threshold
fig, ax = plt.subplots(figsize=(6.0, 3.8))
for chosen, color, label in (
    (~kept, "#BBBBBB", "pruned"),
    (kept, plots.KEPT, "kept"),
):
    ax.plot(
        first[chosen],
        last[chosen],
        ".",
        markersize=1.5,
        color=color,
        label=label,
    )
for edge in (-threshold, threshold):
    ax.axhline(edge, color=plots.PALETTE[1], linestyle="--", linewidth=1)
ax.set(
    xlabel="initial value",
    ylabel="trained value",
    title="fc1: chosen by the trained value, put back to the initial one",
)
ax.legend(loc="upper left", markerscale=6)
plt.show()

# %% [markdown]
# ## By hand
#
# One round on a layer of eight weights: prune a quarter of them by their
# *trained* size, and put the rest back. What is gone is zero. Below it, the
# paper's rule for its LeNet-300-100: 20 % of what is left in each layer go
# in a round, and 10 % in the output layer, which is small already.

# %% tags=["nbval-check-output"]
initial = torch.tensor([[4.0, -3, 2, 1], [-1, 2, 3, -4]])
trained = torch.tensor([[1.0, -5, 3, 6], [-4, 2, 7, -3]])
gone = trained.abs().flatten().argsort()[: round(0.25 * 8)]
mask = torch.ones(8).index_fill(0, gone, 0).view(2, 4)
print("mask  ", mask.int().tolist())
print("ticket", (mask * initial).int().tolist())

sizes = np.array([784 * 300, 300 * 100, 100 * 10])
rates = np.array([0.2, 0.2, 0.1])
print("% left:", end="")
for r in range(1, 15):
    density = (sizes * (1 - rates) ** r).sum() / sizes.sum()
    print(f" {100 * density:.1f}", end="" if r < 14 else "\n")

# %% [markdown]
# The largest *initial* weight of the first row is gone and the smallest one
# stays: training said so. The next round would take a quarter of six. And
# the last line holds the odd numbers that you meet in papers on tickets:
# 51.3, 21.1, 13.5.
#
# ## Maths
#
# Let $\theta_k$ be all weights after $k$ iterations, and $\theta_j$ those
# at the end. One round at rate $p$, with $\tau_p$ the size below which the
# share $p$ of a layer's survivors lies:
#
# $$m \leftarrow m \odot [\,|\theta_j| \ge \tau_p\,], \qquad
# \theta \leftarrow m \odot \theta_k. \tag{1}$$
#
# $k = 0$ is the ticket of 2019. On large networks it fails, and a small
# $k > 0$ mends it. Why, is seen from two copies $\theta^a, \theta^b$ that
# start from one $\theta_k$ and see the data in different orders. Their
# *instability* is the barrier on the straight line between them, of the
# error $E$:
#
# $$\max_{0 \le \beta \le 1} E\big(\beta\,\theta^a + (1 - \beta)\,
# \theta^b\big) - \tfrac12 \big(E(\theta^a) + E(\theta^b)\big). \tag{2}$$
#
# No barrier: from $\theta_k$ on, chance decides nothing that matters.
# Frankle et al. (2020) find that pruning to a ticket works from just about
# there. The racers do without $\theta_j$. They prune the lowest of
#
# $$s_\text{SNIP} = |w\,g|, \quad
# s_\text{GraSP} = w\,(\nabla^2 L\; g), \quad
# s_\text{SynFlow} = w\,\frac{\partial R}{\partial w}, \quad
# R = \mathbf 1^\top |W_n| \cdots |W_1|\, \mathbf 1. \tag{3}$$
#
# **What is assumed.** SNIP: a change of loss to first order, at the first
# step, on one batch. GraSP: what a removal does to the norm of the
# gradient, to first order. SynFlow: nothing about data at all; biases and
# activations are left out, and $R$ is what flows from all inputs to all
# outputs.
#
# ## From scratch
#
# Equation (1) in a loop. `train` is given; it keeps masked weights at zero.


# %%
def search(model, rounds, rate):
    kept = {
        name: torch.ones_like(score, dtype=torch.bool)
        for name, score in magnitude.scores(model).items()
    }
    for index in range(rounds + 1):
        ticket = masks.clone(model)  # theta_0 ...
        masks.apply(ticket, kept)  # ... under the mask: eq. 1, right
        run = train(ticket, seed=index)
        yield ticket, run
        for name, score in magnitude.scores(run.model).items():
            p = rate / 2 if name == "fc3.weight" else rate
            left = score[kept[name]].sort().values
            threshold = left[round(p * len(left))]
            kept[name] &= score >= threshold  # eq. 1, left


ours = [ticket for ticket, _ in search(untrained(0), 2, 0.2)]
for ticket in ours:
    print(f"{1 - masks.sparsity(ticket):.1%} of the weights left")

# %% [markdown]
# ## The library
#
# `find_ticket` is the same search. It yields each round as it is done, can
# rewind to any iteration, prunes by layer or globally, and goes on after a
# break if it is given a `History` with a folder. Both agree:

# %%
theirs = list(
    lottery_tickets.find_ticket(
        untrained(0), dataset, rounds=2, rate=0.2, seed=0, **TRAINING
    )
)
for step in theirs:
    print(
        f"round {step.index}: {step.removed:,} removed, "
        f"{step.density:.1%} left, early stop at {step.early_stop}"
    )
for ticket, step in zip(ours, theirs, strict=True):
    assert abs(1 - masks.sparsity(ticket) - step.density) < 1e-6
mine, its = (masks.masks_of(t) for t in (ours[1], theirs[1].ticket))
assert all(torch.equal(mine[name], its[name]) for name in its)

# %% [markdown]
# ## Explore
#
# Now the whole search, for several seeds, and at each round two controls,
# trained in the same way. *Re-initialised*: the ticket's mask, other
# initial values. *Random*: the ticket's initial values, as many weights in
# each layer, in other places.

# %%
searches = [
    list(
        lottery_tickets.find_ticket(
            untrained(seed), dataset, rounds=ROUNDS, seed=seed, **TRAINING
        )
    )
    for seed in range(SEEDS)
]
shown = [search[:11] for search in searches]  # ten rounds with controls
state = widget.precompute(shown, dataset, **TRAINING)
widget.show(state)

# %% [markdown]
# Move the rounds. Look for the thick marks on the axis of the middle panel,
# which say when each network was at its best, and for the round from which
# the three part. Three rounds for those who read without a kernel:

# %% mystnb={"image": {"alt": "Loss on valid over iterations in three panels, after 2, 7 and 10 rounds. In each the ticket's curve falls first, at or before the dotted dense one, and rises again early. The re-initialised and the random curves fall later, and the later the fewer weights are left."}}
fig, axes = plt.subplots(1, 3, figsize=(8.2, 3.0), sharey=True)
for ax, index in zip(axes, (2, 7, 10), strict=True):
    widget.draw_curves(state, index, ax)
    ax.set_ylabel("loss on valid" if index == 2 else "")
    ax.get_legend().remove()
axes[2].legend(loc="upper right", handlelength=1.8)
plt.show()

# %% [markdown]
# After two rounds the three are not far apart. After ten the ticket falls
# as steeply as ever, while its two controls take their time: the mask
# alone is not it, and the values alone are not it either.
#
# ## Experiment 1: who is at its best when, and how good is it then?

# %% mystnb={"image": {"alt": "Two panels over the share of weights left from 100 to 11 per cent, with bands over seeds. Left, the early stop: the ticket's stays near that of the dense network, the two controls' climb to twice that and more. Right, test accuracy at the early stop: all within a few points, the ticket on top where few weights are left, random lowest."}}
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.3))
for ax, what in zip(axes, widget.MEASURES, strict=True):
    widget.draw_levels(state, what, ax)
axes[0].legend(loc="upper left")
axes[1].get_legend().remove()
plt.show()
AT = 7  # rounds: about 21 % of the weights left


def first(losses, level):
    """When a loss is first as low as the level."""
    low = np.flatnonzero(losses <= level)
    return f"{state.iterations[low[0]]:.0f}" if len(low) else "never"


rows = {}
best = state.valid_loss["ticket"][0].min(1)  # the dense network's, by seed
for name, kind, index in (
    ("dense", "ticket", 0),
    *((kind, kind, AT) for kind in widget.KINDS),
):
    losses = state.valid_loss[kind][index]
    when = [first(*pair) for pair in zip(losses, best, strict=True)]
    stops = [f"{stop:.0f}" for stop in state.early_stop[kind][index]]
    rows[name] = {
        "early stop": ", ".join(stops),
        "as good as dense at": ", ".join(when),
    }
print(f"iterations by seed, {state.densities[AT]:.1%} of the weights left:")
print(pd.DataFrame(rows).T.to_string())

# %% [markdown]
# **Against its controls** the ticket is first, at this size for every seed,
# and they come ever later as weights go. **Against the dense network** there
# is no clear win here: the early stops are alike, within the noise of such
# numbers. The last column says when the loss on `valid` is first as low as
# the dense network's ever gets. Where the ticket gets there, it is clearly
# sooner; but not every seed's ticket does, and the controls do so late or
# never. (With Adam, the paper's choice, we saw the same order of
# the three on these digits.) **In accuracy** there is less to see: one test
# image of 360 is 0.3 points, and only at the far end do the controls fall
# behind. MNIST, below, shows more.
#
# ## Experiment 2: is it the rounds? Is it the signs?
#
# *One shot*: the dense network is trained once, cut in one go to what the
# rounds reached, and rewound. *Signs only* (Zhou et al. 2019): the ticket's
# mask, but each weight starts from the sign of its initial value times one
# constant for its layer.


# %%
def one_shot(search, index):
    """The ticket cut in one go to the densities of round `index`."""
    dense = search[0]
    rates = {
        name: 1 - (1 - rate) ** index
        for name, rate in {"fc1": 0.2, "fc2": 0.2, "fc3": 0.1}.items()
    }
    ticket = masks.clone(dense.ticket)
    found = lottery_tickets.masks_after_round(dense.model, rates)
    masks.apply(ticket, found)
    return ticket


def told(runs):
    """Early stop and accuracy there: mean (range) over seeds."""
    stops = [run.early_stop for run in runs]
    right = [run.accuracy_at_early_stop for run in runs]
    return {
        "early stop": f"{np.mean(stops):.0f} ({min(stops)}-{max(stops)})",
        "test accuracy (%)": f"{100 * np.mean(right):.1f} "
        f"({100 * min(right):.1f}-{100 * max(right):.1f})",
    }


rows = {"dense": told([search[0] for search in searches])}
for index in (AT, ROUNDS):
    left = f"{searches[0][index].density:.0%} left"
    rows[f"{left}: rounds"] = told([search[index] for search in searches])
    for name, make in {
        "one shot": one_shot,
        "signs only": lambda s, i: lottery_tickets.sign_ticket(s[i]),
    }.items():
        rows[f"{left}: {name}"] = told(
            [train(make(s, index), seed) for seed, s in enumerate(searches)]
        )
print(pd.DataFrame(rows).T.to_string())

# %% [markdown]
# While a fifth is left, the ranges overlap. At the far end look at the early
# stop: rounds before one shot, while the accuracies still overlap. Signs do
# most of the work: a winning ticket is not a matter of finely tuned initial
# sizes.
#
# ## Experiment 3: from when on does chance not matter?
#
# Equation (2), on the network above and on a deeper one: eight layers of
# 64 units, which is harder to train. Two copies go on from iteration $k$,
# in different orders of the data; we walk from the one to the other.


# %% mystnb={"image": {"alt": "Test error on the straight line between two trained copies, four curves with bands. The deep network rewound to iteration 0 has a high hump in the middle. Rewound to later iterations it has none on average, with one band still reaching up. The shallow network is flat even from iteration 0."}}
def deep(seed):
    layers = [("flatten", nn.Flatten())]
    generator = torch.Generator().manual_seed(seed)
    widths = [example[0].numel(), *[64] * 7, 10]
    for n in range(1, 9):
        linear = nn.Linear(widths[n - 1], widths[n])
        nn.init.kaiming_normal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [(f"fc{n}", linear), (f"relu{n}", nn.ReLU())]
    return nn.Sequential(OrderedDict(layers[:-1]))


lines = {}
for name, make, k in (
    ("8 layers, k = 0", deep, 0),
    (f"8 layers, k = {ITERATIONS // 10}", deep, ITERATIONS // 10),
    (f"8 layers, k = {ITERATIONS // 3}", deep, ITERATIONS // 3),
    ("LeNet, k = 0", untrained, 0),
):
    lines[name] = [
        lottery_tickets.instability(
            make(seed),
            dataset,
            rewind_to=k,
            iterations=ITERATIONS,
            optimizer="sgd",
            lr=0.05,
            seed=seed,
            progress=False,
        )
        for seed in range(SEEDS)
    ]
plots.curves(
    {
        name: (found[0].alphas, [line.errors for line in found])
        for name, found in lines.items()
    },
    xlabel="place on the line: from one copy (0) to the other (1)",
    ylabel="error on test",
    title="Between two runs from the same iteration k",
)
plt.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()
for name, found in lines.items():
    print(f"{name}: barrier", ", ".join(f"{f.value:.3f}" for f in found))

# %% [markdown]
# Between the deep network's two copies lies a hill. Started a little later
# they end in one valley, or nearly (the ends of single runs are noisy, and a
# seed may keep a small hill). The small LeNet is stable from the very
# beginning: that fits with $k = 0$ being enough here. For large networks the
# authors find that it is not, and rewind to an early iteration
# (`rewind_to=`).
#
# ## Experiment 4: the race
#
# Four scores and a lot, taken at initialisation, with the same batch of 512
# images where they look at data. All networks have the sparsity of a
# ticket and are trained like it.


# %% mystnb={"image": {"alt": "Test accuracy over weights left at 22, 11 and 5 per cent, whole and from 80 per cent up. The ticket stays at the dense level. SNIP, GraSP and SynFlow lie close together with it and fall behind at 5 per cent, random falls steeply at the end, and magnitude at initialisation drops to chance at 11 per cent."}}
def pruned_untrained(method, sparsity, seed):
    images = dataset.batches("train", 512, shuffle=True, seed=seed)
    model = untrained(seed)
    found = at_init.prune_at_initialisation(
        model,
        [next(iter(images))],
        sparsity,
        score=method,
        seed=seed,
        progress=False,
    )
    masks.apply(model, found)
    return model


METHODS = ("snip", "grasp", "synflow", "random", "magnitude")
LEVELS = (AT, 10, ROUNDS)
networks, race = {}, {}
race["ticket"] = [
    [search[index].accuracy_at_early_stop for index in LEVELS]
    for search in searches
]
for method in METHODS:
    race[method] = []
    for seed, search in enumerate(searches):
        runs = []
        for index in LEVELS:
            model = pruned_untrained(method, 1 - search[index].density, seed)
            networks[method, index, seed] = model
            runs.append(train(model, seed))
        race[method].append([run.accuracy_at_early_stop for run in runs])

left = [100 * searches[0][index].density for index in LEVELS]
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.5))
for ax, title in zip(
    axes, ("Pruned before training", "The same, from 80 % up"), strict=True
):
    plots.curves(
        {name: (left, values) for name, values in race.items()},
        xlabel="weights left (%, logarithmic)",
        ylabel="test accuracy at early stop" if ax is axes[0] else "",
        title=title,
        reference=("dense", state.accuracy["ticket"][0].mean()),
        ax=ax,
    )
    ax.set_xscale("log")
    ax.set_xticks(left, [f"{value:.0f}" for value in left])
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.get_legend().remove()
axes[1].set_ylim(0.8, 0.95)
names, labels = axes[0].get_legend_handles_labels()
fig.legend(names, labels, loc="outside upper center", ncols=7)
plt.show()

# %% [markdown]
# Down to a tenth SNIP, GraSP and SynFlow keep up with the ticket within the
# spread; beyond, the ticket, which knows the end of training, is ahead. And
# magnitude, so good a score *after* training, is a disaster before it: why?
#
# ### Layer collapse
#
# Before training a weight's size says only how its layer was initialised.
# Layers with many inputs start small, so that one threshold for all takes
# whole layers away.
# A network that has lost a layer says the same to every input.

# %% mystnb={"image": {"alt": "Five panels, one a method, with the number of weights left in fc1, fc2 and fc3 over the share left from 30 to 0.1 per cent. Magnitude loses fc2 at 10 per cent and fc3 soon after; SynFlow in one round loses two layers at 1 per cent, GraSP and SNIP at the far end; SynFlow in 100 rounds keeps all three lines close together to the end."}}
shares = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
batch = [next(iter(dataset.batches("train", 512, shuffle=True)))]
panels = {
    "magnitude": ("magnitude", None),
    "SNIP": ("snip", None),
    "GraSP": ("grasp", None),
    "SynFlow,\none round": ("synflow", 1),
    "SynFlow,\n100 rounds": ("synflow", 100),
}
fig, axes = plt.subplots(1, 5, figsize=(8.2, 3.0), sharex=True, sharey=True)
for ax, (title, (method, rounds)) in zip(axes, panels.items(), strict=True):
    found = [
        at_init.prune_at_initialisation(
            untrained(0),
            batch,
            1 - share,
            score=method,
            rounds=rounds,
            progress=False,
        )
        for share in shares
    ]
    plots.curves(
        {
            name.removesuffix(".weight"): (
                [100 * share for share in shares],
                [int(kept[name].sum()) for kept in found],
            )
            for name in found[0]
        },
        xlabel="",
        ylabel="weights left in the layer" if ax is axes[0] else "",
        title=title,
        ax=ax,
    )
    lost = [
        share
        for share, kept in zip(shares, found, strict=True)
        if at_init.collapsed_layers(kept)
    ]
    if lost:
        ax.axvspan(100 * max(lost), 0.05, color=plots.REMOVED, zorder=0)
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(-0.3, None)
    ax.set_xticks([10, 1, 0.1], ["10", "1", "0.1"])
    ax.minorticks_off()
    ax.get_legend().remove()
axes[0].set_xlim(45, 0.07)
axes[4].legend(loc="lower left", handlelength=1.5)
axes[2].set_xlabel("weights left (%, logarithmic)")
plt.show()

# %% [markdown]
# Grey is where a layer is gone. What protects SynFlow is that its score is
# *conserved*: what flows into a unit flows out of it, and every layer
# carries all of $R$. A layer with few weights left therefore has large
# scores, and is spared **in the next round**; in one round that does not
# help. The numbers, and then a check by Frankle et al. (2021): shuffle each
# layer's mask. If the method chose *weights*, that must hurt. If it only
# chose how many each layer keeps, it should not.

# %%
scores = lottery_tickets.synflow(untrained(0), example)
flow = [score.sum().item() for score in scores.values()]
print("sum of the scores by layer:", ", ".join(f"{s:.8f}" for s in flow))
assert max(flow) - min(flow) < 1e-12 * max(flow)
into = scores["fc1.weight"].sum(1)  # by unit of the first hidden layer
out = scores["fc2.weight"].sum(0)
print(f"into a unit less out of it: at most {(into - out).abs().max():.0e}")

print(f"\nmasks shuffled within layers, {left[1]:.0f} % of the weights left:")
for method in ("ticket", "snip", "grasp", "synflow"):
    shuffled = []
    for seed, search in enumerate(searches):
        model = search[10].ticket
        if method != "ticket":
            model = networks[method, 10, seed]
        model = lottery_tickets.random_ticket(model, seed=seed)
        shuffled.append(train(model, seed).accuracy_at_early_stop)
    before = [values[1] for values in race[method]]
    print(
        f"  {method:8} {np.mean(before):.1%} becomes {np.mean(shuffled):.1%}"
        f" ({min(shuffled):.1%} to {max(shuffled):.1%})"
    )

# %% [markdown]
# The ticket should lose most: its mask is about these very weights. For the
# others look at how much of the change lies within the range over seeds.
# Frankle et al. report, on larger networks, that shuffling does the racers
# no harm: there they choose how much of each layer stays, not which weights.
#
# ## What it bought
#
# One network in four forms. *Accuracy, cut* is that of the untrained
# sub-network, *trained* that at its early stop. The last row is the bill:
# all iterations spent until the result was there. Latency is for a batch of
# 64, relative to dense.

# %% tags=["table"]
ticket = searches[0][AT]
forms = {
    "dense": (untrained(0), searches[0][0].run, ITERATIONS),
    "ticket": (ticket.ticket, ticket.run, (AT + 1) * ITERATIONS),
}
for name in ("snip", "synflow"):
    model = networks[name, AT, 0]
    forms[name] = (model, train(model, 0), ITERATIONS)
table = {}
for name, (start, run, spent) in forms.items():
    model = masks.clone(run.model)
    masks.make_permanent(model)
    cost = measure.footprint(model, example)
    time = measure.latency(model, example, threads=1).median_ms
    cut = training.evaluate(start, dataset, "test").accuracy
    table[name] = {
        "parameters": f"{cost.parameters:,}",
        "nonzero": f"{cost.nonzero:,}",
        "MACs": f"{cost.macs:,}",
        "depth": cost.depth,
        "latency": time,
        "dense bytes": f"{cost.dense_bytes:,}",
        "coded bytes": f"{cost.coded_bytes:,}",
        "accuracy, cut": f"{cut:.1%}",
        "trained": f"{run.accuracy_at_early_stop:.1%}",
        "early stop": run.early_stop,
        "iterations spent": f"{spent:,}",
    }
slowness = {name: row["latency"] for name, row in table.items()}
for name, row in table.items():
    row["latency"] = f"{slowness[name] / slowness['dense']:.1f}x"
print(pd.DataFrame(table).to_string())

# %% [markdown]
# Fewer non-zeros and fewer coded bytes, at the accuracy of the dense
# network, but no less time: masks do not make dense kernels faster. And the
# ticket was *found* by training the dense network and all the rounds before
# it. It is a discovery about training, and no way to save it. Look also at
# its *accuracy, cut*: far above chance before a single step. The mask alone
# has learnt something (Zhou et al. call it a supermask).
#
# ## The paper's setting
#
# Kept in `results/`, made by `benchmarks/lottery_tickets_mnist.py`:
# LeNet-300-100 on MNIST, initialised and trained as in the paper, but for
# fewer iterations; several seeds, with their standard deviation.

# %% mystnb={"image": {"alt": "Loss on valid over 6,000 iterations on MNIST. The ticket falls fastest and to the lowest level; the dense network is next at first and rises again after its least; the re-initialised and the random network fall more slowly, and their lowest levels lie above the ticket's; at the end all are close together."}}
kept_results = material.material() / "results" / "lottery_tickets_mnist.json"
if kept_results.is_file():
    found = json.loads(kept_results.read_text())
    rows = []
    for row in found["table"]:
        early, right = row["early_stop"], row["accuracy_at_early_stop"]
        rows.append(
            {
                "": row["kind"],
                "left": f"{row['density']:.1%}",
                "seeds": row["seeds"],
                "early stop": f"{early['mean']:.0f} ± {early['std']:.0f}",
                "/ dense": f"{row['early_stop_over_dense']['ratio']:.2f}",
                "test accuracy (%)": f"{100 * right['mean']:.2f} "
                f"± {100 * right['std']:.2f}",
            }
        )
    print(pd.DataFrame(rows).to_string(index=False))
    for name, value in found["paper"].items():
        print(f"\npaper, {name}:\n  {value}", end="")
    loss = {curve["kind"]: curve["valid_loss"] for curve in found["curves"]}
    every = found["setting"]["evaluate_every"]
    at = [every * i for i in range(len(loss["dense"]))]
    kinds = ("ticket", "reinitialised", "random")
    ax = plots.curves(
        {kind: (at, loss[kind]) for kind in kinds if kind in loss},
        xlabel="iteration",
        ylabel="loss on valid",
        title="MNIST, about 21 % of the weights left: mean over seeds",
    )
    for line in ax.lines:
        line.set_marker("")
    ax.plot(at, loss["dense"], color="#555555", linestyle=":", label="dense")
    ax.legend()
    ax.set_ylim(0.05, 0.2)
    plt.show()
else:
    print("results/lottery_tickets_mnist.json: run the benchmark")

# %% [markdown]
# Here more of it is visible: the ticket at a fifth of the weights is at its
# best earlier than the dense network **and** a little more accurate.
# Re-initialised and random it is later than the ticket, and on average later
# than the dense network, though not for every seed. One shot lies in
# between, and signs do as well as values. Not all is as in the paper: the
# re-initialised network is less accurate than the ticket, but no less than
# the dense one. And the early stop of the dense network varies much over
# the seeds, so the ratios to it are rough.
#
# ## Pitfalls
#
# 1. **A ticket is paid for.** Compare a method that prunes at
#    initialisation with a ticket by what both cost.
# 2. **"Early stop" belongs to `valid`.** The best iteration on test
#    flatters every curve.
# 3. **What the published code does** is not the paper. The authors' later
#    `open_lth` prunes globally and leaves the output layer alone; its
#    threshold is itself removed, so that of $n$ to prune $n + 1$ go; and it
#    multiplies by the mask in the forward pass only, so that what the
#    optimiser leaves in a pruned weight is there until the next one, and in
#    the file that is saved.

# %%
total = sum(search[AT].iterations[-1] for search in searches) / SEEDS
print(f"1. to the ticket: {(AT + 1) * total:,.0f} iterations, dense", end=" ")
print(f"{total:,.0f}, SNIP: {total:,.0f} and one batch")
runs = [search[AT].run for search in searches]
honest = np.mean([run.accuracy_at_early_stop for run in runs])
flattered = np.mean([max(run.test_accuracy) for run in runs])
print(f"2. accuracy, stop by valid: {honest:.1%}, by test: {flattered:.1%}")
sizes = torch.arange(1.0, 11)  # ten weights, two shall go
print("3. kept of 10:", int((sizes > sizes.sort().values[2]).sum()), end=", ")
weight = nn.Parameter(torch.ones(10))
optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
mask = (sizes > 3).float()
weight.sum().backward()  # a step before the cut: momentum remembers it
optimizer.step()
with torch.no_grad():
    weight.mul_(mask)
optimizer.zero_grad()
(weight * mask).sum().backward()
optimizer.step()
print("pruned weights not zero:", int((weight[mask == 0] != 0).sum()), "of 3")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: what a search leaves
#
# *Easy · 10 minutes · core.* Given the sizes of the layers from input to
# output, count what is left in each after so many rounds. Every round takes
# `round(rate * n)` of the `n` weights that a layer still has, and of the
# **last** layer at half the rate. Return a list of whole numbers.
#
# <details><summary>Hint</summary>A round takes its share of what is left,
# not of the beginning: loop over the rounds, and round in each.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-04-1", "grade": false, "solution": true, "locked": false, "task": false}
def left_after(sizes, rounds, rate):
    """How many weights each layer has left after so many rounds."""
    ### BEGIN SOLUTION
    left = list(sizes)
    for _ in range(rounds):
        for i, n in enumerate(left):
            share = rate / 2 if i == len(left) - 1 else rate
            left[i] = n - round(share * n)
    return left
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-04-1-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
left = left_after([100, 50, 20], 1, 0.2)
assert left == [80, 40, 18], (
    f"after one round {left}: 20 of 100 go, 10 of 50, and of the last "
    "layer's 20 only a tenth"
)
### BEGIN HIDDEN TESTS
assert left_after([100, 50, 20], 0, 0.2) == [100, 50, 20], "no round at all"
assert left_after([40], 1, 0.5) == [30], "one layer is the output layer"
assert left_after([9, 4], 1, 0.5) == [5, 3], "4 of 9 go: round(4.5) is 4"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-04-1-check-b", "grade": true, "points": 2, "solution": false, "locked": true, "task": false}
sizes = [784 * 300, 300 * 100, 100 * 10]
share = sum(left_after(sizes, 3, 0.2)) / sum(sizes)
assert abs(share - 0.513) < 5e-4, f"{share:.1%} after 3 rounds, not 51.3 %"
given = [30, 20]
left_after(given, 2, 0.5)
assert given == [30, 20], "the list that was handed in has changed"
### BEGIN HIDDEN TESTS
for rounds, density in ((7, 0.211), (9, 0.135), (12, 0.070), (15, 0.036)):
    share = sum(left_after(sizes, rounds, 0.2)) / sum(sizes)
    assert abs(share - density) < 5e-4, f"wrong after {rounds} rounds"
found = left_after([7, 13, 7], 5, 0.3)
model = nn.Sequential(nn.Linear(7, 1), nn.Linear(1, 13), nn.Linear(7, 1))
kept = model
for _ in range(5):
    rates = {"0": 0.3, "1": 0.3, "2": 0.15}
    masks.apply(kept, lottery_tickets.masks_after_round(kept, rates))
theirs = [int(m.sum()) for m in masks.masks_of(kept).values()]
assert found == theirs, f"{found}, but the library keeps {theirs}"
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise 2: prune and rewind
#
# *Medium · 20 minutes · core.* One round for one layer. Given are the
# initial weights, the trained ones, the mask `kept` so far (bool, True =
# still there) and a rate. Remove `round(rate * n)` of the `n` weights that
# are **still there**, the smallest by trained size (you may assume no
# ties), and return the new mask and the rewound weights: initial values
# where kept, zero elsewhere.
#
# Beware: `trained` may hold anything at places that are pruned already, as
# an optimiser with momentum leaves it there. The tensors handed in stay as
# they are.
#
# <details><summary>Hint</summary>Give pruned places the size infinity, sort,
# and the first `round(rate * n)` places are those that go.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-04-2", "grade": false, "solution": true, "locked": false, "task": false}
def prune_and_rewind(initial, trained, kept, rate):
    """The next mask, and the ticket: initial values under it."""
    ### BEGIN SOLUTION
    sizes = trained.abs().masked_fill(~kept, float("inf")).flatten()
    gone = sizes.argsort()[: round(rate * int(kept.sum()))]
    mask = kept.clone(memory_format=torch.contiguous_format)
    mask.view(-1)[gone] = False
    return mask, initial * mask
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-04-2-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
initial = torch.tensor([[0.5, -2.0, 1.5], [0.1, 3.0, -1.0]])
trained = torch.tensor([[1.5, 0.2, -3.0], [-4.0, 0.3, 1.0]])
kept = torch.ones(2, 3, dtype=torch.bool)
mask, ticket = prune_and_rewind(initial, trained, kept, 1 / 3)
assert mask.tolist() == [[True, False, True], [True, False, True]], (
    f"the two smallest trained sizes are 0.2 and 0.3; mask {mask.tolist()}"
)
assert torch.equal(ticket, initial * mask), (
    f"survivors start from their initial values, got {ticket.tolist()}"
)
assert kept.all(), "the mask that was handed in has changed"
### BEGIN HIDDEN TESTS
generator = torch.Generator().manual_seed(0)
for rate in (0.0, 0.2, 0.5, 1.0):
    initial = torch.randn(9, 7, generator=generator)
    trained = torch.randn(9, 7, generator=generator)
    before = initial.clone(), trained.clone()
    everything = torch.ones(9, 7, dtype=torch.bool)
    mask, ticket = prune_and_rewind(initial, trained, everything, rate)
    assert int((~mask).sum()) == round(rate * 63), "wrong count"
    if 0 < rate < 1:
        smallest_kept = trained.abs()[mask].min()
        assert smallest_kept > trained.abs()[~mask].max(), "a larger one went"
    assert torch.equal(ticket != 0, mask), "zeros elsewhere"
    assert torch.equal(ticket[mask], before[0][mask]), "not initial values"
    assert torch.equal(initial, before[0]), "`initial` was changed"
    assert torch.equal(trained, before[1]), "`trained` was changed"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-04-2-check-b", "grade": true, "points": 2, "solution": false, "locked": true, "task": false}
initial = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
trained = torch.tensor([9.0, 3.0, 2.0, 0.0, 7.0, 1.0])  # 9 and 0: pruned
kept = torch.tensor([False, True, True, False, True, True])
mask, ticket = prune_and_rewind(initial, trained, kept, 0.25)
assert mask.tolist() == [False, True, True, False, True, False], (
    "one of the four that are left goes, the one with trained size 1; what "
    f"is gone stays gone; got {mask.tolist()}"
)
### BEGIN HIDDEN TESTS
generator = torch.Generator().manual_seed(1)
layer = nn.Linear(8, 6)
model = nn.Sequential(layer)
for _ in range(3):
    trained = torch.randn(8, 6, generator=generator).T
    with torch.no_grad():
        masks.make_permanent(model)
        kept = model[0].weight != 0
        layer.weight.copy_(trained)
        masks.apply(model, {"0.weight": kept})
    mask, ticket = prune_and_rewind(trained, trained, kept, 0.2)
    assert not trained.is_contiguous()
    theirs = lottery_tickets.masks_after_round(model, 0.2)["0.weight"]
    assert torch.equal(mask, theirs), "not what the library removes"
    masks.apply(model, {"0.weight": theirs})
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise 3: SynFlow's scores
#
# *Hard · 30 minutes.* For a chain of linear layers, given by its weights
# $W_1, \dots, W_n$ (each [outputs, inputs], from input to output), return
# one tensor of scores a layer: $w\,\partial R/\partial w$ of equation (3).
# Weights are 0 where pruned. Leave them as they are.
#
# <details><summary>Hint 1</summary>$R$ is linear in each $|W_l|$: what comes
# into the layer from below, times $|W_l|$, times what goes on to the
# outputs from above.</details>
# <details><summary>Hint 2</summary>below starts as ones and becomes
# $|W_l|$ below; above starts as ones and becomes $|W_l|^\top$ above. The
# score of a weight is above[i] * |w[i, j]| * below[j]. Or let autograd do
# it.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-04-3", "grade": false, "solution": true, "locked": false, "task": false}
def synflow_scores(weights):
    """SynFlow's score of every weight of a chain of linear layers."""
    ### BEGIN SOLUTION
    sizes = [weight.detach().abs() for weight in weights]
    below = [torch.ones_like(sizes[0][0])]
    for size in sizes[:-1]:
        below.append(size @ below[-1])
    above = [torch.ones_like(sizes[-1][:, 0])]
    for size in sizes[:0:-1]:
        above.insert(0, size.T @ above[0])
    return [
        up[:, None] * size * down
        for up, size, down in zip(above, sizes, below, strict=True)
    ]
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-04-3-check-a", "grade": true, "points": 2, "solution": false, "locked": true, "task": false}
weights = [
    torch.tensor([[1.0, -2.0], [0.0, 3.0]]),
    torch.tensor([[-1.0, 2.0]]),
]
first, second = synflow_scores(weights)
assert first.shape == (2, 2), f"scores of the first layer: {first.shape}"
assert first.tolist() == [[1, 2], [0, 6]], f"first layer: {first.tolist()}"
assert second.tolist() == [[3, 6]], f"second layer: {second.tolist()}"
### BEGIN HIDDEN TESTS
(alone,) = synflow_scores([torch.tensor([[-1.0, 2.0], [3.0, 0.0]])])
assert alone.tolist() == [[1, 2], [3, 0]], "one layer: scores are sizes"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-04-3-check-b", "grade": true, "points": 2, "solution": false, "locked": true, "task": false}
generator = torch.Generator().manual_seed(0)
shapes = ((5, 4), (6, 5), (3, 6))
weights = [torch.randn(shape, generator=generator) for shape in shapes]
sums = [scores.sum().item() for scores in synflow_scores(weights)]
assert max(sums) - min(sums) < 1e-4 * max(sums), (
    f"every layer should carry all of R, but the sums are {sums}"
)
### BEGIN HIDDEN TESTS
linears = [nn.Linear(n, m) for m, n in shapes]
model = nn.Sequential(*linears)
with torch.no_grad():
    for linear in linears:
        keep = torch.rand(linear.weight.shape, generator=generator) < 0.7
        linear.weight.mul_(keep)
given = [linear.weight for linear in linears]
before = [weight.detach().clone() for weight in given]
theirs = lottery_tickets.synflow(model, torch.ones(1, 4)).values()
for mine, its in zip(synflow_scores(given), theirs, strict=True):
    assert torch.allclose(mine.detach(), its.float(), rtol=1e-4, atol=1e-7)
for weight, old in zip(given, before, strict=True):
    assert torch.equal(weight.detach(), old), "a weight was changed"
### END HIDDEN TESTS

# %% [markdown]
# ### Open question
#
# A colleague prunes at initialisation with a new score and reports: "at
# 90 % sparsity our network reaches the accuracy of the dense one, and
# beats magnitude pruning at initialisation by 80 points." Which three
# comparisons would you ask for before you believe that the score chooses
# weights well?

# %% [markdown] tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-04-open", "grade": true, "points": 2, "solution": true, "locked": false, "task": false}
# (a) Another baseline: global magnitude at initialisation collapses, so
# that beating it says nothing; random pruning with the same number of
# weights in each layer, and magnitude pruning *after* training (or a
# ticket), with the same total of iterations. (b) The same mask shuffled
# within each layer, and the weights drawn anew: if accuracy stays, only the
# layers' shares matter. (c) Several seeds with their spread, at several
# sparsities, early stop by valid, and whether the dense network is at its
# best, or just trained too long or too little.

# %% [markdown]
# ## Self-check
#
# <details><summary>1. A ticket is trained from a new initialisation under
# the same mask. What happens?</summary>
# It learns, but later, and at high sparsity not as well: mask and initial
# values belong together.</details>
#
# <details><summary>2. Two runs from $\theta_0$ have a barrier between them,
# two from $\theta_{500}$ have none. Where do you rewind to?</summary>
# To 500 (or wherever the barrier vanishes first): from 0 the order of the
# data would lead the ticket elsewhere than it led the network that the mask
# was made from.</details>
#
# <details><summary>3. Why 100 rounds of SynFlow, if no data is looked at and
# nothing is trained in between?</summary>
# Because removing weights changes the flow through the others. A layer that
# has few weights left has large scores only once they are computed anew; in
# one round it can be emptied.</details>
#
# ## Recap
#
# - Most of a network's weights need not be trained, if those that are start
#   where the mask was made for; it is found after the fact.
# - Where two orders of the data lead to one valley, tickets can be found;
#   on large networks that is a little after initialisation.
# - Where few weights are left, no score taken before training matches it;
#   one threshold for all layers can cut the network in two. SynFlow's
#   rounds prevent that.
#
# | method | removes | score | looks at data | makes it really smaller |
# | --- | --- | --- | --- | --- |
# | skeletonization | units | slope of the error | yes | yes |
# | optimal brain damage | weights | $h u^2/2$ | yes | no (zeros) |
# | magnitude pruning | weights | size | no | only dead units |
# | lottery ticket | weights, before training | trained size | by training | only dead units |
# | SNIP, GraSP, SynFlow | weights, before training | eq. (3) | one batch; SynFlow none | only dead units |
#
# Next: lesson 5, structured pruning, makes networks really smaller.
#
# ## References
#
# - J. Frankle, M. Carbin, *The Lottery Ticket Hypothesis: Finding Sparse,
#   Trainable Neural Networks*, ICLR 2019. Read sections 1 and 2, and put
#   its figure on LeNet beside experiment 1.
# - J. Frankle, G. K. Dziugaite, D. M. Roy, M. Carbin, *Linear Mode
#   Connectivity and the Lottery Ticket Hypothesis*, ICML 2020. Read how
#   instability is defined, and which networks are stable when.
# - H. Zhou, J. Lan, R. Liu, J. Yosinski, *Deconstructing Lottery Tickets:
#   Zeros, Signs, and the Supermask*, NeurIPS 2019. Read what remains when
#   the initial values are replaced by constants.
# - A. Renda, J. Frankle, M. Carbin, *Comparing Rewinding and Fine-tuning in
#   Neural Network Pruning*, ICLR 2020. Read the comparison with the
#   retraining of lesson 3, and what rewinding the learning rate alone does.
# - N. Lee, T. Ajanthan, P. H. S. Torr, *SNIP: Single-shot Network Pruning
#   based on Connection Sensitivity*, ICLR 2019. Read section 4, from the
#   mask as a variable to equation (3).
# - C. Wang, G. Zhang, R. Grosse, *Picking Winning Tickets Before Training by
#   Preserving Gradient Flow*, ICLR 2020. Read why the gradient's norm is
#   what it wants to keep.
# - H. Tanaka, D. Kunin, D. L. K. Yamins, S. Ganguli, *Pruning Neural Networks
#   without Any Data by Iteratively Conserving Synaptic Flow*, NeurIPS 2020.
#   Read what layer collapse is, and the two conservation laws.
# - J. Frankle, G. K. Dziugaite, D. M. Roy, M. Carbin, *Pruning Neural Networks
#   at Initialization: Why Are We Missing the Mark?*, ICLR 2021. Read the
#   shuffled and the re-initialised masks: the end of the race, so far.
