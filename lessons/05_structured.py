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
# # Structured against unstructured
#
# reading: 35 minutes · compute: about 1 minute ·
# before: lesson 3 (magnitude, masks, dead units) ·
# paper: Li et al. 2017, LOBSTER, SeReNe, Fang et al. 2023
#
# *Take out nine weights in ten, and the network is as slow as before. Take
# out half of the channels, and it is really faster.* Lesson 3 ended on a
# mask that bought bytes and no time. This lesson removes whole filters and
# channels: what is left is an ordinary, smaller network. The price is that
# less can go.
#
# ## You will be able to
#
# 1. **rank** the filters of a layer and say what goes with them
#    (exercise 1);
# 2. **weigh** a channel over all the layers that share it (exercise 2);
# 3. **remove** a channel that still says something, without changing what
#    the network computes (exercise 3);
#
# and to say, of any claim of sparsity, what it bought.
#
# ## Set-up

# %% tags=["setup"]
import json
import sys
from collections import OrderedDict
from functools import partial

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", "install -q pruning101")

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch import nn

from pruning101 import magnitude, structured
from pruning101.core import data, masks, measure, models, plots
from pruning101.core import structure, training
from pruning101.core.sparse_layout import sparse_layout
from pruning101.course import material
from pruning101.widgets import structured as widget

torch.manual_seed(0)
torch.set_num_threads(1)  # small networks: more only get in each other's way
plots.use_style()
pd.set_option("display.width", 79)

# %% tags=["parameters"]
PROFILE = "quick"  # "standard": MNIST, minutes; "paper": MNIST, long

# %% [markdown]
# The networks below are trained once and used all through the lesson.

# %%
NAME, SIZE, IMAGES, EPOCHS, RETRAIN, STRENGTH, SEEDS = {
    "quick": ("digits", 16, None, 15, 4, 1e-3, 3),
    "standard": ("mnist", 28, 10_000, 5, 2, 3e-4, 2),
    "paper": ("mnist", 28, None, 40, 20, 1e-4, 3),
}[PROFILE]
dataset = data.load(NAME, image_size=SIZE).subset(train=IMAGES)
example, _ = next(iter(dataset.batches("valid", 64)))
SETTINGS = {"lr": 0.05, "batch_size": 64, "schedule": "cosine"}
SETTINGS |= {"progress": False}


def trained(seed, model=None, epochs=EPOCHS, **options):
    """A network trained with the lesson's settings; a LeNet-5 by default."""
    if model is None:
        model = models.build(
            "lenet5", in_channels=1, image_size=SIZE, seed=seed
        )
    training.fit(
        model, dataset, epochs=epochs, seed=seed, **SETTINGS, **options
    )
    return model.eval()


def accuracy(model, split="test"):
    return training.evaluate(model, dataset, split).accuracy


dense = [trained(seed) for seed in range(SEEDS)]
cost = measure.footprint(dense[0], example)
print(f"LeNet-5 on {dataset.name}: {cost.parameters:,} parameters,", end=" ")
print(f"{cost.macs:,} MACs")
print("test accuracy by seed:", *(f"{accuracy(m):.1%}" for m in dense))

# %% [markdown]
# ## Intuition
#
# The second convolution as a table: one row a filter, 25 columns for each
# channel that it reads. Both pictures keep exactly a quarter of its
# weights. On the left the largest ones, wherever they are. On the right
# half of the filters, and of each of them half of the channels.
#
# **Predict before you go on:** which of the two layers runs faster, and by
# what factor? And which has hurt the network less?

# %% mystnb={"image": {"alt": "Two pictures of a table of 50 rows and 500 columns with a quarter of it kept. Left, single weights: kept weights are scattered like dust over the whole table. Right, channels: half of the rows and half of the column blocks are empty, the rest is full."}}
second = dense[0].conv2.weight.detach()
dust = masks.from_scores({"conv2": second.abs()}, 0.75)["conv2"]
rows = second.abs().sum((1, 2, 3)).topk(25).indices
columns = second.abs().sum((0, 2, 3)).topk(10).indices
blocks = torch.zeros_like(dust)
blocks[rows[:, None], columns] = True
fig, axes = plt.subplots(1, 2, figsize=(8.2, 2.9), sharey=True)
for ax, (title, mask) in zip(
    axes,
    {"single weights": dust, "filters and channels": blocks}.items(),
    strict=True,
):
    layer = masks.clone(dense[0])
    masks.apply(layer, {"conv2.weight": mask})
    plots.mask_image(mask.flatten(1), ax=ax)
    ax.set_title(
        f"{title}: {mask.float().mean():.0%} kept,\n"
        f"accuracy {accuracy(layer, 'valid'):.0%}, not retrained"
    )
    ax.set(xlabel="weights, 25 for each input channel", ylabel="filter")
    ax.label_outer()
plt.show()

# %% [markdown]
# The dust keeps accuracy better: each weight is chosen by itself. But the
# routine that multiplies matrices has to walk over the whole table on the
# left. On the right it gets one of half the height and half the width.
#
# ## By hand
#
# A layer of 4 x 4 weights loses half of them. One by one, the eight
# smallest. As filters, the two rows of the smallest sum $\sum |w|$: rows 1
# and 3, although row 3 holds the largest weight of all.

# %% tags=["nbval-check-output"]
layer = torch.tensor(
    [[5, -1, 4, 6], [1, -2, 1, -7], [-5, 6, 2, -4], [2, 1, -8, 1]]
)
norms = layer.abs().sum(1)
rows = norms.topk(2).indices.sort().values
print("norms of the rows:", norms.tolist())
print("single weights, still 4 x 4:\n", layer * (layer.abs() >= 4))
print("rows, a layer of 2 x 4:\n", layer[rows])

# %% [markdown]
# The next layer now gets two values instead of four: its columns 1 and 3 go
# as well. **A channel is a row here and a column there.**
#
# At a residual addition it is more than that. Two layers make the same
# *stream* by addition, so their outputs must have equally many channels, in
# the same order. Remove channel 0 of `stem`, and channel 0 of `branch` has
# nothing to be added to: both go, with column 0 of every layer that reads
# the sum. Such a set is a **group** of coupled channels, and it needs one
# ranking:

# %% tags=["nbval-check-output"]
stem = torch.tensor([[1, -1], [2, 1], [-3, 1]])  # makes 3 channels
branch = torch.tensor([[4, -3], [1, 1], [2, -1]])  # adds 3 more to them
head = torch.tensor([[3, -1, 1], [1, 1, 0]])  # reads the 3 sums
members = [stem.abs().sum(1), branch.abs().sum(1), head.abs().sum(0)]
for name, norms in zip(("stem", "branch", "head"), members, strict=True):
    print(f"{name:6} {norms.tolist()}: would drop {int(norms.argmin())}")
together = torch.stack(members).sum(0)
print(f"group  {together.tolist()}: drops {int(together.argmin())}")

# %% [markdown]
# Three layers, three opinions: channel 0, the stem's weakest, is the
# strongest of the group.
#
# ## Maths
#
# Let $W_m[c]$ be what layer $m$ of a group $G$ has to do with channel $c$:
# rows of those that make it, columns of those that read it. The importance
# of the channel is the mean over the group,
#
# $$\rho_c = \frac{1}{|G|} \sum_{m \in G} \lVert W_m[c] \rVert. \tag{1}$$
#
# With the layer that makes it alone in $G$ and the L1 norm this is the
# *filter norm* of Li et al. It looks at no data and assumes what lesson 3
# assumed: that size tells worth.
#
# Two regularisers of the seminar shrink what is *insensitive* while the
# network trains. LOBSTER does it for each weight by itself, after the
# optimiser's step, with $g = \partial L / \partial w$ and
# $[x]_+ = \max(x, 0)$:
#
# $$w \leftarrow w - \eta\,g - \lambda\,w\,[\,1 - |g|\,]_+. \tag{2}$$
#
# SeReNe asks for a whole unit, or filter, $i$ how strongly the $K$ outputs
# react to its pre-activation, and shrinks all weights $w_i$ that lead into
# it:
#
# $$S_i = \frac{1}{K} \sum_{k=1}^{K} \mathrm{E}\left|
# \frac{\partial y_k}{\partial z_i} \right|, \qquad
# w_i \leftarrow w_i - \eta\,g_i - \lambda\,w_i\,[\,1 - S_i\,]_+. \tag{3}$$
#
# Both then zero what lies below one threshold, chosen such that the loss on
# `valid` rises by no more than a given tolerance, and train on.
# **What is assumed**: that a gradient of 1 is a meaningful unit. Where all
# gradients are far below 1, the bracket is 1 for all, and what remains is
# plain weight decay. We shall look.
#
# ## From scratch
#
# Filter norms and surgery for a chain of layers. No mask is left: the
# weights are cut to a smaller size.


# %%
def prune_chain(model, share):
    small = masks.clone(model)
    layers = [m for m in small.modules() if hasattr(m, "weight")]
    weights = [m.weight.detach() for m in layers]
    norms = [w.abs().flatten(1).sum(1) for w in weights]  # eq. 1, rows only
    for i, norm in enumerate(norms[:-1]):  # the last layer's are the classes
        stay = len(norm) - round(share * len(norm))
        keep = norm.topk(stay).indices.sort().values
        weights[i] = weights[i][keep]
        layers[i].bias = nn.Parameter(layers[i].bias.detach()[keep])
        columns = weights[i + 1].unflatten(1, (len(norm), -1))
        weights[i + 1] = columns[:, keep].flatten(1, 2)
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(weight.contiguous())
    return small


ours = prune_chain(dense[0], 0.5)
for name, model in {"dense": dense[0], "half the channels": ours}.items():
    cost = measure.footprint(model, example)
    print(
        f"{name}: {cost.parameters:,} parameters, {cost.macs:,} MACs, "
        f"accuracy {accuracy(model):.1%}"
    )

# %% [markdown]
# Half of the channels, and a bit more than a quarter of the parameters is
# left: an inner layer loses rows *and* columns. After the last convolution
# one channel may own several columns of the next layer, one for each place
# of the image: that is what `unflatten` is for.
#
# ## The library
#
# The same call from `pruning101`. It finds the groups by running the
# network, so it needs an example; `kept` says which channels stayed.

# %%
norms = structured.filter_norms(dense[0])
del norms["fc2"]  # the classes stay
pruned = structured.prune_channels(
    dense[0], example, 0.5, scores=norms, inplace=False
)
print("removed:", pruned.removed)
with torch.no_grad():
    change = (pruned.model(example) - ours(example)).abs().max()
assert change < 1e-5, f"outputs differ by {change:.1g}"

# %% [markdown]
# ## What goes together
#
# Now a network with a residual block: `conv` makes a stream of eight
# channels, `block.conv2` adds to it, `fc` reads it. Below are its layers as
# tables, weights summed over the kernel's places. In orange, what belongs
# to channel 3 of the stream.

# %% mystnb={"image": {"alt": "Six tables of weights side by side, in the order in which the network runs: conv, norm, block.conv1, block.conv2, block.bn2, fc. Channel 3 of the stream is orange: a row of conv, of norm, of block.conv2 and of block.bn2, and a column of block.conv1 and of fc. Nothing else of block.conv1 is orange."}}


def residual(seed):
    """A stem of eight channels, one residual block, a linear layer."""
    torch.manual_seed(seed)
    layers = OrderedDict(
        conv=nn.Conv2d(1, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        relu=nn.ReLU(),
        down=nn.MaxPool2d(2),
        block=models.BasicBlock(8, 8, 1),
        pool=nn.AdaptiveAvgPool2d(2),
        flatten=nn.Flatten(),
        fc=nn.Linear(32, 10),
    )
    return trained(seed, nn.Sequential(layers))


branched = residual(0)
groups = structure.channel_groups(branched, example)
stream = max(groups, key=lambda group: len(group.producers))
shown = ["conv", "norm", "block.conv1", "block.conv2", "block.bn2", "fc"]
tables = {}
for name in shown:
    weight = branched.get_submodule(name).weight.detach().abs()
    while weight.dim() > 2:
        weight = weight.sum(-1)
    tables[name] = weight.reshape(len(weight), -1)
fig, axes = plt.subplots(
    1,
    len(shown),
    figsize=(8.2, 3.0),
    width_ratios=[max(5, t.shape[1]) for t in tables.values()],
)
for ax, (name, table) in zip(axes, tables.items(), strict=True):
    part = torch.zeros_like(table, dtype=torch.bool)
    for member in (*stream.producers, *stream.consumers, *stream.others):
        if member.layer == name:
            part.index_fill_(
                member.axis, member.index[member.channel == 3], True
            )
    grey = 0.95 - 0.6 * table / table.max()
    colours = torch.stack([grey] * 3, -1)
    orange = torch.tensor([0.84, 0.37, 0.0])  # the palette's
    colours[part] = orange + (1 - orange) * (grey[part, None] - 0.3)
    ax.imshow(colours.clamp(0, 1), aspect="auto", interpolation="nearest")
    ax.set_title(name, fontsize="small")
    ax.set(xticks=[], yticks=range(0, len(table), 3))
    ax.grid(visible=False)
axes[0].set_ylabel("row (output channel)")
fig.supxlabel("column (input)", fontsize="medium")
plt.show()
for group in groups:
    print(
        f"{group.name}: made by",
        ", ".join(m.layer for m in group.producers),
        "· read by",
        ", ".join(m.layer for m in group.consumers),
    )

# %% [markdown]
# `block.conv1` has channels of its own, inside the branch. The stream's go
# through the whole network, here in six places. `channel_groups` follows
# them (the search is Torch-Pruning's, after Fang et al.).
#
# Half of both groups goes now. If the surgery is right, the small network
# computes **what the dense one does with those channels set to zero**:

# %%
small = structured.prune_channels(branched, example, 0.5, inplace=False)
zeroed = masks.clone(branched)
for group in groups:
    gone = torch.ones(group.channels, dtype=torch.bool)
    gone[small.kept[group.name]] = False
    with torch.no_grad():
        for member in (*group.producers, *group.others):
            for tensor in zeroed.get_submodule(member.layer).parameters():
                tensor[member.index[gone[member.channel]]] = 0
with torch.no_grad():
    change = (small.model(example) - zeroed(example)).abs().max()
    effect = (zeroed(example) - branched(example)).abs().max()
assert change < 1e-5, f"pruned is not zeroed: {change:.1g}"
print(f"zeroing moves the outputs by {effect:.1f},", end=" ")
print(f"the surgery by another {change:.0e}")

# %% [markdown]
# ## Explore
#
# The first two layers of LeNet-5, with one kind of pruning or the other;
# after each cut the network is retrained for two epochs. Look for two
# things: which bars follow the slider, and what a missing filter in the
# upper row does to the column below it.

# %%
state = widget.precompute(dense[0], dataset)
widget.show(state)

# %% [markdown]
# Three settings of the same controls, for those who read without a kernel:

# %% mystnb={"image": {"alt": "Three pictures of the second layer's filters as tiles, with bars below. Left, half of the single weights gone: every tile is speckled with grey; only the bar of the coded bytes is shorter. Middle, 90 per cent of the weights gone: most tiles are grey; coded bytes are an eighth, dense bytes, MACs and latency still at about 100 per cent. Right, 60 per cent of the channels gone: whole rows and columns are crossed out and all four bars are short."}}
fig, axes = plt.subplots(
    2, 3, figsize=(8.2, 4.6), height_ratios=(2.2, 1), sharey="row"
)
chosen = (widget.WEIGHTS, 0.5), (widget.WEIGHTS, 0.9), (widget.CHANNELS, 0.6)
for (above, below), (kind, share) in zip(axes.T, chosen, strict=True):
    at = int(np.abs(state.sparsities - share).argmin())
    widget.bank(state.second[kind][at], ax=above)
    above.set_title(
        f"{share:.0%} of the {kind.split()[-1]} gone,\n"
        f"accuracy {state.accuracy[kind][at]:.0%}"
    )
    left = [100 * state.cost[kind][name][at] for name in widget.COSTS]
    below.barh(widget.COSTS, left, color=plots.KEPT, height=0.6)
    below.axvline(100, color="#555555", linestyle=":")
    below.set(xlim=(0, 115), xlabel="left (%)")
    below.grid(axis="y", visible=False)
axes[1, 0].invert_yaxis()
plt.show()

# %% [markdown]
# ## Experiment 1: a channel of zeros still speaks
#
# A regulariser or a mask may empty whole filters and leave their biases, or
# those of the norm behind them. Such a channel emits a constant. Cut it out
# and the constant goes missing in all that read it, at a residual addition
# in the whole stream. `materialise` follows constants through norms,
# activations, pooling and additions, adds them to the biases of whoever
# reads them, and only then takes the channels out.
#
# Here half of all channels are masked in their weights, biases left, and
# the rest is retrained. Then they are removed, carelessly and carefully:

# %%
holed, gone = masks.clone(branched), {}
for group in groups:
    order = structured.group_importance(group, branched).argsort()
    gone[group.name] = order[: group.channels // 2]
    for member in group.producers:
        weight = branched.get_submodule(member.layer).weight
        mask = torch.ones_like(weight, dtype=torch.bool)
        mask[member.index[torch.isin(member.channel, gone[group.name])]] = 0
        masks.apply(holed, {f"{member.layer}.weight": mask})
trained(0, holed, RETRAIN)

careless = masks.clone(holed)
masks.make_permanent(careless)
for name, positions in gone.items():
    structure.remove_channels(careless, name, positions, example)
careful = structured.materialise(holed, example)
with torch.no_grad():
    for name, model in {
        "zeros": holed,
        "constants dropped": careless,
        "constants folded": careful.model,
    }.items():
        change = (model(example) - holed(example)).abs().max()
        cost = measure.footprint(model, example)
        print(
            f"{name:18} {cost.parameters:5,} parameters, outputs move by "
            f"{change:.1g}, accuracy {accuracy(model):.1%}"
        )
assert (careful.model(example) - holed(example)).abs().max() < 1e-4
print("block.conv2 is now a", type(careful.model.block.conv2).__name__)

# %% [markdown]
# About a third of the size either way, and one of the two is another network.
# Where a convolution pads with zeros, the constant ends at the border and no
# bias can say that: `materialise` then puts a `ConstantBorder` around it,
# which adds what is right at every place, for a few parameters more.
#
# ## Experiment 2: the race
#
# The same dense networks, six rounds, the same epochs of retraining after
# each. *Single weights*: magnitude, one threshold for all layers.
# *Channels*: equation (1). *Channels by lot*: whatever these reach is owed
# to retraining, not to the choice. The same runs over three costs:

# %% mystnb={"image": {"alt": "Three panels of test accuracy with the cost falling from left to right, for single weights, channels and random channels. Over parameters that are not zero, single weights stay highest longest. Over coded bytes the three lie closer together, single weights still ahead. Over latency, single weights stand still at 100 per cent while channels go down to a fifth with little loss; random channels fall earlier."}}
ROUNDS = {"rounds": 6, "epochs": RETRAIN, "lr": SETTINGS["lr"]}
ROUNDS["retrain"] = {"schedule": "cosine", "batch_size": 64}


ENDS = {"single weights": 0.985, "channels": 0.88}


def single_weights(model, seed, sparsity=ENDS["single weights"], **options):
    options = ROUNDS | {"penalty": None, "scope": "global"} | options
    return magnitude.prune_iteratively(
        model, dataset, sparsity=sparsity, seed=seed, **options
    )


def channels(model, seed, sparsity=ENDS["channels"], **options):
    options = ROUNDS | options
    return structured.prune_iteratively(
        model, dataset, sparsity=sparsity, seed=seed, **options
    )


by_lot = partial(structured.group_importance, kind="random")
race = {
    "single weights": single_weights,
    "channels": channels,
    "channels by lot": lambda model, seed: channels(
        model, seed, scores=partial(by_lot, seed=seed)
    ),
}
steps = {
    name: [list(run(model, seed)) for seed, model in enumerate(dense)]
    for name, run in race.items()
}

whole = measure.footprint(dense[0], example)
costs = {"non-zero parameters": {}, "coded bytes": {}}
for name, runs in steps.items():
    prints = [[step.footprint for step in run] for run in runs]
    for cost, part in (
        ("non-zero parameters", "nonzero"),
        ("coded bytes", "coded_bytes"),
    ):
        paid = [[getattr(p, part) for p in run] for run in prints]
        costs[cost][name] = np.mean(paid, 0) / getattr(whole, part)
taking_turns = [step.model for runs in steps.values() for step in runs[0]]
clock = widget.relative_latency([dense[0], *taking_turns], example)[1:]
costs["latency"] = dict(zip(steps, clock.reshape(len(steps), -1), strict=True))
fig, axes = plt.subplots(1, 3, figsize=(8.2, 3.2), sharey=True)
for ax, (cost, paid) in zip(axes, costs.items(), strict=True):
    plots.curves(
        {
            name: (
                100 * paid[name],
                [[step.test_accuracy for step in run] for run in runs],
            )
            for name, runs in steps.items()
        },
        xlabel=f"{cost} (% of dense)",
        ylabel="test accuracy",
        ax=ax,
    )
    ax.set_xscale("log")
    ticks = (100, 50, 20) if cost == "latency" else (100, 30, 10, 3, 1)
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.label_outer()
for ax in axes[1:]:
    ax.get_legend().remove()
axes[0].locator_params(axis="y", nbins=5)
axes[0].set_title("Equal retraining: mean and range over seeds")
plt.show()

# %% [markdown]
# Who wins depends on what is counted. **Left**, it hardly matters what goes
# until a fifth of the parameters is left; from there on single weights win by
# far, each on its own merit. **Right**, they have not even started. Channels
# chosen by their norm beat the lot, though not at first: retraining repairs
# what the choice got wrong.
#
# ## Experiment 3: at equal accuracy
#
# The seminar's table asks the fair question. For each kind we take the last
# round whose accuracy **on valid**, mean over seeds, is within one point of
# the dense networks', and then look at everything.

# %% tags=["table"] mystnb={"image": {"alt": "Bars for single weights and for channels, in per cent of the dense network. Non-zero parameters and coded bytes: single weights far shorter. Dense bytes, MACs and latency: single weights at 100 per cent or near it, channels at a small part."}}
floor = np.mean([accuracy(model, "valid") for model in dense]) - 0.01
chosen = {}
for name in ("single weights", "channels"):
    on_valid = np.mean([[s.accuracy for s in run] for run in steps[name]], 0)
    chosen[name] = max(
        [i for i, value in enumerate(on_valid) if value >= floor], default=0
    )
forms = {"dense": dense[0]}
forms |= {n: steps[n][0][i].model for n, i in chosen.items()}
sizes = {name: measure.footprint(m, example) for name, m in forms.items()}
sparse = sparse_layout(forms["single weights"], layers=["fc1", "fc2"])
everything = [*forms.values(), sparse]
timed = {
    batch: widget.relative_latency(everything, example[:batch])
    for batch in (1, 64)
}
retrained = {"dense": [accuracy(model) for model in dense]}
cut = {"dense": retrained["dense"]}
for name, run in (("single weights", single_weights), ("channels", channels)):
    share = 1 - (1 - ENDS[name]) ** ((chosen[name] + 1) / ROUNDS["rounds"])
    options = {"sparsity": share, "rounds": 1, "epochs": 0}
    found = [list(run(m, s, **options))[-1] for s, m in enumerate(dense)]
    cut[name] = [step.test_accuracy for step in found]
    retrained[name] = [r[chosen[name]].test_accuracy for r in steps[name]]

rows = {}
for i, name in enumerate(forms):
    size = sizes[name]
    low, high = min(retrained[name]), max(retrained[name])
    rows[name] = {
        "parameters": f"{size.parameters:,}",
        "non-zero": f"{size.nonzero:,}",
        "MACs": f"{size.macs:,}",
        "depth": size.depth,
        "dense bytes": f"{size.dense_bytes:,}",
        "coded bytes": f"{size.coded_bytes:,}",
        "latency, batch 1": f"{timed[1][i]:.1g}x",
        "latency, batch 64": f"{timed[64][i]:.1g}x",
        "accuracy, cut": f"{np.mean(cut[name]):.1%}",
        "retrained": f"{np.mean(retrained[name]):.1%}",
        "range over seeds": f"{low:.1%} to {high:.1%}",
    }
print(pd.DataFrame(rows).to_string())
print("single weights in a sparse layout (linear layers only): latency")
print(f"{timed[1][-1]:.1g}x at batch 1, {timed[64][-1]:.1g}x at batch 64")

bars = {
    "non-zero\nparameters": lambda size: size.nonzero,
    "coded\nbytes": lambda size: size.coded_bytes,
    "dense\nbytes": lambda size: size.dense_bytes,
    "MACs": lambda size: size.macs,
}
fig, ax = plt.subplots(figsize=(8.2, 3.2))
places = np.arange(len(bars) + 2)
for i, name in enumerate(chosen):
    left = [count(sizes[name]) / count(whole) for count in bars.values()]
    left += [timed[batch][i + 1] for batch in (64, 1)]
    drawn = ax.bar(
        places + 0.4 * (i - 0.5),
        100 * np.array(left),
        width=0.38,
        color=plots.PALETTE[i],
        hatch=("", "//")[i],
        edgecolor="white",
        label=name,
    )
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    ax.bar_label(drawn, fmt="{:.0f}", fontsize="small", padding=2, bbox=ground)
ax.axhline(100, color="#555555", linestyle=":")
ax.set_xticks(places, [*bars, "latency,\nbatch 64", "latency,\nbatch 1"])
ax.grid(axis="x", visible=False)
ax.set(ylabel="left (% of the dense network)", ylim=(0, 125))
ax.set_title("Within one point of the dense accuracy")
ax.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
plt.show()

# %% [markdown]
# **Far more zeros, hardly any faster; fewer channels, really faster.** Single
# weights win on what can be coded, channels on what a machine must hold and
# do. At batch 1 even channels gain little here: the network is so small that
# calling its routines takes longer than their work. Nor does a sparse layout
# help here: torch has one for linear layers only, and ours are small.
#
# ## Experiment 4: what do LOBSTER and SeReNe add?
#
# First the premise. How large are the gradients whose distance from 1
# decides, and the sensitivities? (Those that are exactly 0 are left out.)
# Look where the dashed line is.

# %% mystnb={"image": {"alt": "Two histograms on a logarithmic axis, with a dashed line at 1. Left, sizes of the gradients of all weights: a heap several orders of magnitude below 1, whether the network is new or trained. Right, sensitivities of all units: about a hundredth, also far left of the line."}}
states = {"new": trained(0, epochs=0), "trained": dense[0]}
fig, axes = plt.subplots(1, 2, figsize=(8.2, 2.8), sharex=True)
for i, (name, model) in enumerate(states.items()):
    first_batch = [next(iter(dataset.batches("train", 64)))]
    slopes = structured.gradients(model, first_batch)
    felt = structured.neuron_sensitivity(model, first_batch)
    weights = [s.flatten() for n, s in slopes.items() if "weight" in n]
    for ax, values in zip(axes, (weights, felt.values()), strict=True):
        found = torch.cat(list(values)).abs()
        sizes_10 = found[found > 0].log10()
        counts, edges = np.histogram(sizes_10, bins=40, range=(-7, 1))
        ax.stairs(
            counts / len(found),
            edges,
            color=plots.PALETTE[i],
            linestyle=plots.DASHES[i],
            linewidth=1.6,
            label=name,
        )
named = ("$|g|$ of all weights", "$S$ of all units")
for ax, what in zip(axes, named, strict=True):
    ax.axvline(0, color="#555555", linestyle="--")
    ax.set_xticks([-6, -4, -2, 0], ["$10^{-6}$", "$10^{-4}$", "0.01", "1"])
    ax.set(xlabel=what)
axes[0].set_ylabel("share")
axes[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# Nearly everything is far below 1, so both brackets are nearly 1, for
# sensitive weights as for others. Now the effect. The dense networks train
# on for a few epochs, with nothing, with plain decay
# $w \leftarrow w - \lambda w$, with LOBSTER and with SeReNe, at the same
# $\lambda$; then 90 % of the weights, or half of the channels, are cut.


# %%
def decay(model):
    with torch.no_grad():
        for layer in structure.prunable(model).values():
            layer.weight.mul_(1 - STRENGTH)


def with_serene(seed, model, epochs):
    options = {"sensitivity": "lower_bound"}
    with structured.serene(model, STRENGTH, **options) as shrink:
        return trained(seed, model, epochs, after_step=shrink)


shrinking = {
    "nothing": trained,
    "plain decay": partial(trained, after_step=decay),
    "LOBSTER": partial(trained, after_step=structured.lobster(STRENGTH)),
    "SeReNe": with_serene,
}


def cut_and_retrained(model, seed):
    """Accuracies: 90 % of the weights cut, retrained; channels likewise."""
    keep = masks.from_scores(magnitude.scores(model), 0.9)
    sparse = masks.clone(model)
    masks.apply(sparse, keep)
    narrow = structured.prune_channels(model, example, 0.5, inplace=False)
    found = []
    for pruned in (sparse, narrow.model):
        found += [accuracy(pruned), accuracy(trained(seed, pruned, RETRAIN))]
    return found


added = {}
for name, train_on in shrinking.items():
    nets = [
        train_on(seed, masks.clone(model), 2 * RETRAIN)
        for seed, model in enumerate(dense)
    ]
    found = np.array([cut_and_retrained(m, s) for s, m in enumerate(nets)])
    added[name] = [
        f"{100 * v.mean():.0f} ({100 * v.min():.0f}-{100 * v.max():.0f})"
        for v in found.T
    ]
columns = ["weights, cut", "retrained", "channels, cut", "retrained "]
print("test accuracy in %, mean (range over seeds)")
print(pd.DataFrame(added, index=columns).T.to_string())

# %% [markdown]
# The baseline for LOBSTER and SeReNe is *plain decay*, not nothing. In so
# few epochs the four can hardly be told apart, which neither speaks for the
# regularisers nor proves them useless. What the figure shows is that the
# unit is missing: here neither gradients nor sensitivities come near 1.
# (The authors train for longer and prune in many rounds:
# `regularise_and_prune`, whose runs belong to the next section.)
#
# ## Experiment 5: two of four
#
# Between dust and blocks lies a pattern that hardware can follow: of every
# four neighbouring inputs keep the two largest. The count is exact in every
# row, and the tensor cores of NVIDIA's GPUs (from 2020 on) can skip what is
# zero, by their maker's count at up to twice the speed. On a machine that
# cannot, 2:4 is one more mask.

# %%
row = torch.tensor([[0.5, -2.0, 1.5, 0.1, -3.0, 1.0, 0.2, -0.4]])
print(structured.semi_structured({"row": row.abs()})["row"].int())
patterns = {
    "2 of 4": structured.semi_structured,
    "any half of a layer": lambda s: masks.from_scores(s, 0.5, scope="layer"),
    "1 of 4": lambda s: structured.semi_structured(s, keep=1),
    "any quarter of a layer": lambda s: masks.from_scores(
        s, 0.75, scope="layer"
    ),
}
print("accuracy in %, mean (range): cut, and retrained")
for name, pattern in patterns.items():
    values = []
    for seed, model in enumerate(dense):
        copy = masks.clone(model)
        scores = magnitude.scores(model)
        del scores["conv1.weight"]  # it has one input channel
        masks.apply(copy, pattern(scores))
        before = accuracy(copy)
        values.append((before, accuracy(trained(seed, copy, RETRAIN))))
    told = [
        f"{100 * v.mean():.1f} ({100 * v.min():.1f}-{100 * v.max():.1f})"
        for v in np.array(values).T
    ]
    print(f"  {name:23} {told[0]:18} {told[1]}")

# %% [markdown]
# At a half, a free choice of the same number is hardly better: here 2:4
# costs next to nothing. At 1 of 4 the pattern binds: compare before
# retraining. On a GPU that has the cores,
# `torch.sparse.to_sparse_semi_structured` stores such a weight and
# multiplies by it; on a laptop there is nothing to measure.
#
# ## The papers' setting
#
# Kept in `results/`, made by three benchmarks of the same names. First
# LeNet-5 on MNIST, each method at the sparsest round within its tolerance on
# `valid`. Then networks as large as the seminar's, untrained, at the ratios
# of its slide: what does the clock say? (Dead units are taken out in all of
# them: that is the slide's *simplified topology*.) Last, LOBSTER
# and SeReNe by their own procedure, beside plain decay and magnitude at the
# same bound.

# %%
results = {}
for name in (
    "structured_against_unstructured",
    "sparse_latency",
    "sensitivity_mnist",
):
    path = material.material() / "results" / f"{name}.json"
    results[name] = json.loads(path.read_text()) if path.is_file() else None
    if results[name] is None:
        print(f"results/{name}.json is not here: run the benchmark")


def times(row, kind="latency", threads=1):
    """How many times as fast as dense, at batches 1 and 64."""
    if row[kind] is None:
        return "-"
    found = []
    for batch in (1, 64):
        ratio = row[kind][f"threads{threads}_batch{batch}"]["speedup"]
        ratio = ratio["mean"] if isinstance(ratio, dict) else ratio
        found.append(f"{ratio:.1f}" if ratio < 1.95 else f"{ratio:.0f}")
    return " / ".join(found)


def mean(row, what):
    return row["last_round"][what]["mean"]


def share(name, row, of):
    return f"{row[name] / of[name]:.0%}"


if results["structured_against_unstructured"]:
    kept_summary = results["structured_against_unstructured"]["summary"]
    rows = {
        row["method"]: {
            "zeros": f"{row['zero_share']['mean']:.0%}",
            "gone": f"{row['removed_share']['mean']:.0%}",
            "bytes": f"{row['simplified_bytes']['mean'] / 1e3:,.0f} K",
            "coded": f"{row['coded_bytes']['mean'] / 1e3:,.0f} K",
            "test": f"{row['test_accuracy']['mean']:.2%}",
        }
        for row in kept_summary
    }
    print(f"LeNet-5 on MNIST, {kept_summary[0]['seeds']} seeds")
    print(pd.DataFrame(rows).T.to_string(), "\n")
    rows = {
        row["method"]: {
            f"{label}{threads} thread{'s' * (threads - 1)}": times(
                row, kind, threads
            )
            for label, kind in (
                ("", "latency"),
                ("CSR, ", "latency_sparse_layout"),
            )
            for threads in (1, 2)
        }
        for row in kept_summary
    }
    print("times as fast as dense, batch 1 / batch 64 (CSR: sparse layout)")
    print(pd.DataFrame(rows).T.to_string(), "\n")
if results["sparse_latency"]:
    wanted = ("unstructured_simplified", "structured_parameters")
    rows = {}
    for net, found in results["sparse_latency"]["networks"].items():
        slides = found["slides"]
        first = found["rows"][0]
        for row in found["rows"] if slides else ():
            if row["name"] not in wanted:
                continue
            there, whole_there = slides[row["kind"]], slides["dense"]
            fast = [
                whole_there["ms"][device] / ms
                for device, ms in there["ms"].items()
            ]
            rows[f"{net} {row['kind'].removesuffix('uctured')}."] = {
                "gone": f"{row['removed_share']:.0%}",
                "bytes": share("simplified_bytes", row, first),
                "coded": share("coded_bytes", row, first),
                "times": times(row),
                "| gone": f"| {there['ratio']:.0%}",
                "bytes ": share("simplified_mb", there, whole_there),
                "coded ": share("coded_mb", there, whole_there),
                "times ": f"{min(fast):.1f} to {max(fast):.1f}",
            }
    print("ours (1 thread, batch 1 / 64)        | the slide's (four devices)")
    print(pd.DataFrame(rows).T.to_string(), "\n")
    print("the zeros in a sparse layout, times as fast as dense:")
    for net, found in results["sparse_latency"]["networks"].items():
        (row,) = (r for r in found["rows"] if r["name"] == wanted[0])
        print(f"  {net:9}", times(row, "latency_sparse_layout"))
    print("a linear layer n x n in CSR is faster from a sparsity of")
    for batch in (1, 64):
        from_on = [
            f"never ({row['features']})"
            if row["crossing"] is None
            else f"{row['crossing']:.0%} ({row['features']})"
            for row in results["sparse_latency"]["linear"]["rows"]
            if row["batch"] == batch and row["threads"] == 1
        ]
        print(f"  batch {batch}:", ", ".join(from_on))
    print()
if results["sensitivity_mnist"]:
    for net, found in results["sensitivity_mnist"]["nets"].items():
        rows = {
            method: {
                "seeds": row["last_round"]["test_error"]["n"],
                "weights gone": f"{mean(row, 'weights_removed'):.0%}",
                "units gone": f"{mean(row, 'hidden_neurons_removed'):.0%}",
                "test error, %": f"{mean(row, 'test_error'):.1f}",
            }
            for method, row in found["summary"].items()
            if method != "channel_norms"  # as many as SeReNe: here none
        }
        print(f"{net}, MNIST, last round of the papers' procedure")
        print(pd.DataFrame(rows).T.to_string())

# %% [markdown]
# Ours and the slide's agree in what matters: eight or nine zeros in ten leave
# the bytes and time of large convolutional networks nearly where they were;
# half of the parameters, taken as channels, does more for the clock. Where
# many units die, as in AlexNet and LeNet-5, they can be taken out, and the
# bytes fall too: by structure again. **One row speaks for the zeros.** AlexNet
# is nearly all large linear layers, and with 99 % zeros in a sparse layout it
# is faster than with channels taken out; convolutions have no such kernel.
# The coded bytes differ. The slide's
# coder brings the *unpruned* VGG-16 from 60 MB to 3.6, so it probably rounds
# the weights as well, and with it the structured networks are smallest. Ours
# is lossless, and there the zeros win. In the last table the rows are as far
# apart as their seeds: in a training of this length, neither LOBSTER nor
# SeReNe takes out more than magnitude does without them, and hardly a unit
# vanishes. (The example of LOBSTER's code is set to 10,000 epochs.)
#
# ## Pitfalls
#
# 1. **A mask is not a smaller network**, not even where whole channels are
#    masked: nothing is smaller before the surgery.
# 2. **Half of the channels is not half of the parameters.** A share $p$ of
#    the channels takes about $1 - (1 - p)^2$ of the parameters and MACs:
#    rows and columns go. Ask of every "50 % pruned" what was counted.
# 3. **An optimiser made before the surgery trains nothing.** It still holds
#    the old tensors; it runs, the loss is reported, and the new network
#    stays as it is. The same goes for averages of weights and for hooks.
# 4. **MACs are not latency.** Small layers wait for calls and memory, not for
#    multiplications.

# %%
masked = holed
held = {
    name: sum(tensor.nbytes for tensor in model.state_dict().values())
    for name, model in {"dense": branched, "masked": masked}.items()
}
print("1. bytes held:", ", ".join(f"{n} {b:,}" for n, b in held.items()))
for share in (0.3, 0.5, 0.7):
    size = measure.footprint(prune_chain(dense[0], share), example)
    print(
        f"2. {share:.0%} of the channels: "
        f"{1 - size.parameters / whole.parameters:.0%} of the parameters, "
        f"{1 - size.macs / whole.macs:.0%} of the MACs gone "
        f"(rule: {1 - (1 - share) ** 2:.0%})"
    )
stale = masks.clone(dense[0])
early = torch.optim.SGD(stale.parameters(), lr=0.1)
structured.prune_channels(stale, example, 0.5)
late = torch.optim.SGD(stale.parameters(), lr=0.1)
for when, optimiser in {"before": early, "after": late}.items():
    weight = stale.conv2.weight.detach().clone()
    stale(example).square().mean().backward()
    optimiser.step()
    moved = (stale.conv2.weight.detach() - weight).abs().max()
    print(f"3. optimiser made {when} the surgery: moved by {moved:.1g}")
half = prune_chain(dense[0], 0.5)
macs = measure.footprint(half, example).macs / whole.macs
for batch in (1, 64):
    ratio = widget.relative_latency([dense[0], half], example[:batch])[1]
    print(f"4. batch {batch}: {macs:.1g}x the MACs, {ratio:.1g}x the time")

# %% [markdown]
# What published code really did, and ours does not:
#
# - A much used tool that removes zeroed channels drops the constants at
#   residual additions: in our trials the outputs of a ResNet-18 moved by
#   26 %, those of a ResNet-50 by 46 %. Without biases it is exact, and so
#   is its own test.
# - LOBSTER's code prunes at a threshold found by bisection. It returns the
#   **middle** of the last interval, which may exceed the loss it promised;
#   `prune_within` returns the safe end.
# - SeReNe's code differentiates the *mean* of the outputs over the batch
#   and averages once more: its full $S$ is too small by the batch size. Ours
#   is equation (3). That is not the whole reason why all units shrink nearly
#   alike: in the figure of experiment 4 the scale is right, and $S$ is still
#   far below 1.
#
# ## Exercises
#
# ### Exercise 1: keep the largest filters
#
# *Easy · 10 minutes · core.* Given the weights of a layer, [filters, ...],
# return the positions of the `count` filters of the largest L1 norm,
# **ascending**, as an int64 tensor. Among equal norms the lower position
# goes first, as everywhere in this course.
#
# <details><summary>Hint 1</summary>flatten(1) leaves one row a filter,
# whatever the shape.</details>
# <details><summary>Hint 2</summary>sort(stable=True) keeps equal values in
# their order; topk promises nothing.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-05-1", "grade": false, "solution": true, "locked": false, "task": false}
def largest_filters(weight, count):
    """Ascending positions of the `count` filters of the largest L1 norm."""
    ### BEGIN SOLUTION
    norms = weight.abs().flatten(1).sum(1)
    ranked = norms.sort(stable=True).indices
    return ranked[len(norms) - count :].sort().values
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-05-1-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
weight = torch.tensor([[1.0, 0, 2], [-5, 1, 0], [1, 1, 0], [0, 0, 4]])
kept = largest_filters(weight, 2)
assert isinstance(kept, torch.Tensor), f"a tensor, not {type(kept).__name__}"
assert kept.tolist() == [1, 3], (
    f"the norms are 3, 6, 2, 4: rows 1 and 3 stay, not {kept.tolist()}"
)
### BEGIN HIDDEN TESTS
generator = torch.Generator().manual_seed(0)
for shape in ((9, 4), (9, 2, 3), (9, 3, 5, 5)):
    weight = torch.randn(shape, generator=generator)
    sizes = weight.flatten(1).abs().sum(1).tolist()
    for count in (1, 4, 9):
        kept = largest_filters(weight, count).tolist()
        assert kept == sorted(kept), "not ascending"
        assert len(kept) == count, f"{len(kept)} filters stay, not {count}"
        gone = set(range(9)) - set(kept)
        larger = all(sizes[a] > sizes[b] for a in kept for b in gone)
        assert larger, "a filter went that is larger than one that stays"
across = torch.randn(3, 5, 7, generator=generator).transpose(0, 2)
assert len(largest_filters(across, 2)) == 2, "a transposed tensor must work"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-05-1-check-b", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
weight = torch.tensor([[2.0], [-1], [1], [-2], [1], [1]])
kept = largest_filters(weight, 3).tolist()
assert kept == [0, 3, 5], f"of equal norms the last ones stay, not {kept}"
### BEGIN HIDDEN TESTS
for count in range(1, 41):
    kept = largest_filters(torch.ones(40, 2), count).tolist()
    assert kept == list(range(40 - count, 40)), "ties: the lower goes first"
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise 2: one ranking for a residual stream
#
# *Medium · 15 minutes · core.* Several layers make a stream by addition,
# several read it; weights are [outputs, inputs, ...]. Return the importance
# of each of its channels, equation (1) with the L1 norm: the mean **over
# the layers** of what each holds of the channel, its row sum if it makes
# the stream, its column sum if it reads it.
#
# <details><summary>Hint 1</summary>transpose(0, 1) turns a reader into
# something like a maker.</details>
# <details><summary>Hint 2</summary>Kernels differ in size; only the
# channels are common. Sum over all the rest first, then stack.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-05-2", "grade": false, "solution": true, "locked": false, "task": false}
def stream_importance(makers, readers):
    """Mean over all layers of their L1 norm in each channel, [channels]."""
    ### BEGIN SOLUTION
    slices = list(makers)
    slices += [weight.transpose(0, 1) for weight in readers]
    norms = [weight.abs().flatten(1).sum(1) for weight in slices]
    return torch.stack(norms).mean(0)
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-05-2-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
makers = [torch.tensor([[1.0, -1], [2, 1], [-3, 1]])]
makers += [torch.tensor([[4.0, -3], [1, 1], [2, -1]])]
readers = [torch.tensor([[3.0, -1, 1], [1, 1, 0]])]
found = stream_importance(makers, readers)
assert found.shape == (3,), f"three channels, but shape {tuple(found.shape)}"
assert torch.allclose(found * 3, torch.tensor([13.0, 7, 8])), (
    f"the sums by hand were 13, 7, 8, over 3 layers; got {found.tolist()}"
)
### BEGIN HIDDEN TESTS
found = stream_importance([torch.eye(2)], [])
assert found.tolist() == [1.0, 1.0], "a stream that nobody reads"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-05-2-check-b", "grade": true, "points": 2, "solution": false, "locked": true, "task": false}
maker, reader = torch.ones(4, 2, 3, 3), torch.ones(5, 4, 1, 1)
reader[:, 2] = -7.0
found = stream_importance([maker], [reader]).tolist()
assert found == [11.5, 11.5, 26.5, 11.5], (
    f"18 from each row; 5, 5, 35, 5 from the columns; got {found}"
)
### BEGIN HIDDEN TESTS
generator = torch.Generator().manual_seed(1)
for count in (1, 2, 5):
    makers = [torch.randn(6, count, 3, generator=generator)] * count
    readers = [torch.randn(count + 1, 6, 5, 5, generator=generator)]
    found = stream_importance(makers, readers)
    for channel in range(6):
        whole = sum(float(w[channel].abs().sum()) for w in makers)
        whole += float(readers[0][:, channel].abs().sum())
        want = whole / (count + 1)
        assert abs(float(found[channel]) - want) < 1e-3, "not the mean"
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise 3: fold what a dead filter still says
#
# *Hard · 25 minutes.* A convolution, its `BatchNorm2d`, a ReLU, then a
# **1x1** convolution. Some filters of the first are all zero (its bias, if
# it has one, need not be). Return a new 1x1 convolution that reads only the
# other channels and gives the same, in `eval` mode. Leave the given modules
# alone.
#
# <details><summary>Hint 1</summary>A dead filter sends its bias, or 0,
# into the norm: what comes out is the same everywhere.</details>
# <details><summary>Hint 2</summary>The norm computes weight * (x -
# running_mean) / sqrt(running_var + eps) + bias. After the ReLU, a 1x1
# kernel turns constants into constants: into the new bias.</details>


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-05-3", "grade": false, "solution": true, "locked": false, "task": false}
def fold_dead_filters(first, norm, second):
    """A new 1x1 convolution that reads only the filters that are alive."""
    ### BEGIN SOLUTION
    dead = (first.weight == 0).flatten(1).all(1)
    enters = 0.0 if first.bias is None else first.bias
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    emitted = ((enters - norm.running_mean) * slope + norm.bias).relu()
    weight = second.weight.flatten(1)
    shift = weight[:, dead] @ emitted[dead]
    alive = int((~dead).sum())
    small = nn.Conv2d(alive, second.out_channels, 1)
    with torch.no_grad():
        small.weight.copy_(second.weight[:, ~dead])
        small.bias.copy_(shift if second.bias is None else second.bias + shift)
    return small
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-05-3-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
first, norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4).eval()
second = nn.Conv2d(4, 2, 1)
with torch.no_grad():
    first.weight[[0, 2]] = 0
small = fold_dead_filters(first, norm, second)
shape = tuple(small.weight.shape)
assert shape == (2, 2, 1, 1), f"two channels stay, but the shape is {shape}"
assert second.in_channels == 4, "the given layers must stay as they are"
### BEGIN HIDDEN TESTS
before = second.weight.clone(), second.bias.clone()
fold_dead_filters(first, norm, second)
assert torch.equal(second.weight, before[0]), "second's weights were changed"
assert torch.equal(second.bias, before[1]), "second's bias was changed"
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-05-3-check-b", "grade": true, "points": 3, "solution": false, "locked": true, "task": false}
first, norm = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3).eval()
second = nn.Conv2d(3, 2, 1)
with torch.no_grad():
    first.weight[1] = 0
    norm.bias[1], norm.running_mean[1] = 3.0, 1.0  # 3 - 1 = 2 comes out
images = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    hidden = norm(first(images)).relu()
    expected = second(hidden)
small = fold_dead_filters(first, norm, second)
with torch.no_grad():
    change = (small(hidden[:, [0, 2]]) - expected).abs().max()
assert change < 1e-5, (
    f"outputs move by {change:.2g}: what does the dead filter emit after "
    "norm and ReLU?"
)
### BEGIN HIDDEN TESTS
for seed in range(12):
    generator = torch.Generator().manual_seed(seed)
    first = nn.Conv2d(2, 7, 3, bias=seed % 2 == 0)
    norm, second = nn.BatchNorm2d(7).eval(), nn.Conv2d(7, 3, 1, bias=seed % 3)
    dead = torch.rand(7, generator=generator) < 0.5
    dead[0], dead[1] = True, False
    with torch.no_grad():
        first.weight[dead] = 0
        first.weight[~dead, 0, 0, 0] = 0  # single zeros do not make it dead
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.copy_(torch.randn(7, generator=generator))
        norm.running_var.copy_(0.1 + torch.rand(7, generator=generator))
        if seed % 4 == 0:
            first.bias[dead] = 2.0
    images = torch.randn(3, 2, 5, 5, generator=generator)
    with torch.no_grad():
        hidden = norm(first(images)).relu()
        expected = second(hidden)
    small = fold_dead_filters(first, norm, second)
    with torch.no_grad():
        change = (small(hidden[:, ~dead]) - expected).abs().max()
    assert change < 1e-4, "the function is not the same"
### END HIDDEN TESTS

# %% [markdown]
# ### Open question
#
# Channels are pruned and the rest retrained. Liu et al. (2019) train a
# network of the *same narrow shape* from scratch, for as long, and often
# reach the same accuracy. What would that say about the importance scores
# of this lesson? How would you find out here, fairly?

# %% [markdown] tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-05-open", "grade": true, "points": 2, "solution": true, "locked": false, "task": false}
# It would say that the scores find a good *shape* (how many channels each
# layer needs) at best, and with equal shares in all layers not even that:
# the inherited weights would be worth only the training time they save. To
# find out: the same shape (a) pruned by norm, (b) pruned by lot, (c) newly
# initialised; (c) gets the epochs of dense training plus those of
# retraining; several seeds; decide on valid. If (a) and (c) agree within
# their spread, train narrow from the start, unless a dense network is at
# hand already.

# %% [markdown]
# ## Self-check
#
# <details><summary>1. Each layer loses 30 % of its channels. About how many
# parameters are left?</summary>
# Half: (1 - 0.3)^2 = 0.49, but for the first and the last layer, which lose
# on one side only.</details>
#
# <details><summary>2. Why does Torch-Pruning remove a row of `block.conv2`
# when you asked for a channel of `conv`?</summary>
# Their outputs are added: the sum needs the same channels from both.
# </details>
#
# <details><summary>3. All weights of a filter are zero, but its norm has a
# bias. May it go?</summary>
# Yes, if the constant it emits is folded into the layer that reads it. With
# zero padding there this constant ends at the border, and one bias cannot
# say so.</details>
#
# ## Recap
#
# - Single weights: far more can go, which saves bytes when coded, and hardly
#   any time.
# - Channels: less can go, but what is left is a smaller dense network, and
#   the clock agrees. Coupled channels go together, and what they emit as a
#   constant is folded onwards.
# - Say what was measured: share of weights or of channels, parameters,
#   MACs, bytes, milliseconds. They are five different numbers.
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
#
# Next: lesson 6 removes no width but depth: it folds whole layers into
# their neighbours.
#
# ## References
#
# - H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, *Pruning Filters
#   for Efficient ConvNets*, ICLR 2017. Read section 3: filter norms, and
#   figure 2 for how layers differ.
# - Z. Liu, J. Li, Z. Shen, G. Huang, S. Yan, C. Zhang, *Learning Efficient
#   Convolutional Networks through Network Slimming*, ICCV 2017. Read
#   section 3: the norm's own scale as a score, made sparse in training.
# - P. Molchanov, A. Mallya, S. Tyree, I. Frosio, J. Kautz, *Importance
#   Estimation for Neural Network Pruning*, CVPR 2019. Read section 3: the
#   Taylor score, lesson 1's slope on a channel.
# - E. Tartaglione, A. Bragagnolo, A. Fiandrotti, M. Grangetto, *LOss-Based
#   SensiTivity rEgulaRization: Towards Deep Sparse Neural Networks*, Neural
#   Networks 2022 (arXiv 2020). Read how insensitivity is defined, with
#   equation (2) and the first figure of experiment 4 beside it.
# - E. Tartaglione, A. Bragagnolo, F. Odierna, A. Fiandrotti, M. Grangetto,
#   *SeReNe: Sensitivity-Based Regularization of Neurons for Structured
#   Sparsity in Neural Networks*, TNNLS 2021. Read its three sensitivities,
#   and the procedure: train to a plateau, prune within a bound, again.
# - A. Bragagnolo, E. Tartaglione, A. Fiandrotti, M. Grangetto, *On the Role
#   of Structured Pruning for Neural Network Compression*, ICIP 2021. Read
#   the one table: it is this lesson's.
# - Z. Liu, M. Sun, T. Zhou, G. Huang, T. Darrell, *Rethinking the Value of
#   Network Pruning*, ICLR 2019. Read the introduction with the open question
#   in mind.
# - A. Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021. Read
#   how 2:4 is stored, and how networks are retrained for it.
# - G. Fang, X. Ma, M. Song, M. B. Mi, X. Wang, *DepGraph: Towards Any
#   Structural Pruning*, CVPR 2023. Read section 3: how groups are found.
