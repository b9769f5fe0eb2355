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
# # Pruning neural networks: the course
#
# A trained network is larger than its task needs. Each lesson takes one idea
# of what is superfluous, from 1988 until today: a weight, a unit, a channel,
# a whole layer, a token. It tells the idea in a picture, works it by hand,
# states it in a few equations, builds it in a few lines, and then measures it
# against simpler ways at equal cost.
#
# Nearly every method is the same four verbs:
#
# **train → score → remove → measure** (and often: heal, then again).

# %% [markdown]
# ## The lessons
#
# Open a lesson and run it from top to bottom (*Run → Run All Cells*). It
# takes about a minute on a laptop, without a GPU and without a network. The
# exercise version is the same lesson with the solutions taken out, for you
# to fill in; each check below an exercise says what is still wrong.
#
# | | Lesson | Paper | Reading | Compute | Know before |
# | --- | --- | --- | --- | --- | --- |
# | 01 | [Skeletonization](01_skeletonization.ipynb) ([exercises](exercises/01_skeletonization.ipynb)) | Mozer & Smolensky 1988 | 30 min | half a minute | training a small network; what a gradient is |
# | 02 | [Optimal brain damage](02_optimal_brain_damage.ipynb) ([exercises](exercises/02_optimal_brain_damage.ipynb)) | LeCun, Denker & Solla 1989 | 35 min | 1 minute | training a small network; what a second derivative is |
# | 03 | [Magnitude pruning](03_magnitude.ipynb) ([exercises](exercises/03_magnitude.ipynb)) | Han et al. 2015 | 30 min | 1 minute | training a small network; lesson 2 helps but is not needed |
# | 04 | [Lottery tickets, and the race to prune at initialisation](04_lottery_tickets.ipynb) ([exercises](exercises/04_lottery_tickets.ipynb)) | Frankle & Carbin 2019 | 35 min | 1 minute | lesson 3 |
# | 05 | [Structured against unstructured](05_structured.ipynb) ([exercises](exercises/05_structured.ipynb)) | Li et al. 2017, LOBSTER, SeReNe, Fang et al. 2023 | 35 min | 1 minute | lesson 3 (magnitude, masks, dead units) |
# | 06 | [Layer folding](06_layer_folding.ipynb) ([exercises](exercises/06_layer_folding.ipynb)) | Ben Dror et al. 2022 | 35 min | 1 minute | lesson 3 (footprint, comparing at equal budget); lesson 5 helps |
# | 07 | [Activation entropy](07_activation_entropy.ipynb) ([exercises](exercises/07_activation_entropy.ipynb)) | EGP, NEPENTHE, EASIER, TLC | 35 min | 1 minute | lesson 6 (what can be folded and merged) |
# | 08 | [Layer collapse](08_layer_collapse.ipynb) ([exercises](exercises/08_layer_collapse.ipynb)) | Zibakhsh Shabgahi et al. 2023 | 35 min | 1 minute | training a small network; lesson 6 (slopes, merging) helps |
# | 09 | [Whole layers by optimal transport](09_lacoot.ipynb) ([exercises](exercises/09_lacoot.ipynb)) | LaCoOT (Quétu et al. 2025) | 35 min | 1.5 minutes | training a small network; lesson 8's experiments help |
# | 10 | Intra-fusion (not there yet) | Theus et al. 2024 | | | |
# | 11 | Token folding (not there yet) | ToMe 2023, FOLDER 2025 | | | |
# | 12 | Frontiers (not there yet) | what is being tried now | | | |
#
# Lessons 1 to 3 stand on nothing but ordinary training of networks; begin
# with any of them.

# %% [markdown]
# ## Three sizes of every lesson
#
# The cell that sets `PROFILE` near the top of a lesson chooses how much it
# computes.
#
# | `PROFILE` | Data | Takes |
# | --- | --- | --- |
# | `"quick"` | 1,797 real handwritten digits, embedded | about a minute |
# | `"standard"` | MNIST, Fashion-MNIST or CIFAR-10 | minutes on a CPU |
# | `"paper"` | the paper's own setting | a GPU |
#
# What is stored in these notebooks comes from `"quick"`. Your numbers may
# differ in their last digits: another count of threads, or another
# processor, adds in another order.

# %% [markdown]
# ## Symbols
#
# One letter means one thing throughout the course.
#
# | Symbol | In code | Meaning |
# | --- | --- | --- |
# | $w$, $W$ | `weight` | a weight; the weights of a layer, [outputs, inputs] |
# | $b$ | `bias` | the biases of a layer, [outputs] |
# | $x$, $t$ | `images`, `labels` | an input and its target |
# | $y$ | `outputs` | what the network gives for it |
# | $z$ | `pre_activation` | what a unit sums up, before its activation |
# | $a = f(z)$ | `activation` | what a unit emits |
# | $\delta = \partial E / \partial z$ | | slope of the error in a pre-activation |
# | $L$ | `loss` | the loss that training lowers, mean over examples |
# | $E$ | `error` | an error that a score is measured in, where it is not $L$ |
# | $g = \partial L / \partial w$ | `gradient` | first derivative |
# | $h = \partial^2 L / \partial w^2$ | `hessian` | second derivative, one a weight |
# | $s$ | `saliency`, `scores` | what removing a weight is estimated to cost |
# | $\rho$ | `relevance` | what removing a unit is estimated to cost |
# | $\alpha$ | `attention` | a unit's strength: 1 as it is, 0 removed |
# | $\alpha$ | `slope` | an activation's slope below zero: 0 is ReLU, 1 a line (lessons 6 to 8) |
# | $m$ | `mask` | 1 where a weight is kept, 0 where it is pruned |
# | $\theta_k$ | `state_dict` | all weights of a network after $k$ iterations |
# | $p$ | `rate` | share of the weights left that one round removes |
# | $\beta$ | `alphas` | place on the line between two networks, 0 to 1 |
# | $R$ | | what flows from all inputs to all outputs (SynFlow) |
# | $q$, $\sigma$ | `quality` | a threshold's factor; a layer's standard deviation |
# | $\pi$ | `share_on` | share of what a unit sees for which it is ON |
# | $\mathcal{H}$ | `entropy` | bits that the states of a layer's units have, on average |
# | $\gamma$ | `norm.weight` | scale of a norm, one a channel |
# | $\epsilon$ | `error_likelihood` | how often a unit is not in its usual state |
# | $I$ | `importance` | entropy of a layer times its mean weight (EGP) |
# | $G$ | `group` | channels that go together, in all layers they run through |
# | $k_1$, $s_1$, $p_1$ | `kernel_size`, `stride`, `padding` | of the first of two convolutions; $k$, $s$, $p$ of the one they make |
# | $\mu$ | `momentum` | an optimiser's momentum |
# | $S$ | `sensitivity` | how strongly the outputs react to a unit |
# | $\lambda$ | `strength` | weight of a penalty in the loss |
# | $v$ | `projections` | a direction of length 1 among features |
# | $D$ | `distance` | max-sliced Wasserstein distance of two sets of features |
# | $r$ | `relative_change` | how far outputs are from their own inputs, in lengths of these |
# | $B$ | `blocks` | number of blocks that may go |
# | $\eta$ | `lr` | learning rate |
# | $N$, $C$, $H$, $W$ | `images.shape` | examples, channels, height, width |
# | $K$ | `classes` | number of outputs |

# %% [markdown]
# ## Glossary
#
# - **Accuracy**: share of examples that are classified rightly.
# - **Block**: layers beside a shortcut, whose output is added to their input.
# - **Border**: the outputs at an image's edge, where one convolution cannot do
#   what two did, because the second read zeros there.
# - **Budget**: what two methods must have in common to be compared: steps of
#   training, examples seen, or the size of the result.
# - **Channel**: one image among those that a layer emits. The **filter** that
#   makes it is a row of the layer's weights; each layer that reads it has a
#   column for it.
# - **Coded bytes**: size of the stored weights after entropy coding, where
#   zeros cost nearly nothing. **Dense bytes**: without it.
# - **Collapsing** a pair: merging two linear layers whose activation has become
#   linear.
# - **Dead unit**: a unit without inputs or without outputs left. One without
#   inputs still emits its bias.
# - **Dense**: a network from which nothing was removed.
# - **Depth**: layers with weights on the longest path through a network.
# - **Early stop**: the iteration at which the loss on valid is least.
# - **Entropy of a layer**: how undecided its units are between ON and OFF, in
#   bits: 1 where each is ON half of the time, 0 where none ever switches.
# - **Fine-tuning, healing, retraining**: training on after a removal.
# - **Folding**: making an activation linear and merging the layers around it.
# - **Footprint**: parameters, non-zeros, MACs, depth and bytes, together.
# - **Frechet distance**: how far two sets of images are apart: the distance of
#   two Gaussians with the means and covariances of a classifier's features.
# - **Global, layerwise**: whether one threshold serves all layers, or each
#   layer has its own.
# - **Group**: channels that can only be removed together, in every layer that
#   makes, treats or reads them.
# - **Instability**: height of the barrier of error on the line between two
#   trainings from one start that saw the data in different orders.
# - **Iteration**: one step of the optimiser, on one batch.
# - **Latency**: time that one answer takes, as measured on a machine.
# - **MACs**: multiply-adds that one input costs.
# - **Layer collapse**: a layer loses all its weights, and the network answers
#   every input alike. (The method LayerCollapse of lesson 8 is something else.)
# - **Linearise**: put an identity in the place of an activation.
# - **Magnitude**: absolute value of a weight.
# - **Mask**: zeros and ones that say which weights are gone. A masked network
#   is as large and as slow as before.
# - **Materialise**: turn zeros that fill whole channels into a smaller network
#   of the same function.
# - **Max-sliced Wasserstein distance**: how far two sets of points are apart
#   along the direction in which they are furthest apart.
# - **Merging**: writing two layers with nothing non-linear between as one.
# - **ON, OFF**: the two states of a unit, its pre-activation above or below 0.
#   At exactly 0 it is in neither.
# - **One-shot, iterative**: whether all is removed at once, or a little at a
#   time with training in between.
# - **Penalty**: a term added to the loss that makes a network easier to prune.
# - **Pruning**: removing parts of a trained network.
# - **Rewinding**: putting surviving weights back to earlier values.
# - **Saliency, relevance, score**: an estimate of what a removal would cost.
# - **Self-distillation**: training a changed network to answer as it did
#   before the change.
# - **Semi-structured**: a fixed number of zeros in every few weights, as 2 of
#   4, which some GPUs can skip.
# - **Sensitivity**: how strongly outputs or loss react to a small change.
# - **Slope**: what a trainable activation multiplies negative inputs with.
# - **Sparsity**: share of the weights that are zero. **Density** is the rest.
# - **Structured, unstructured**: whether whole units, channels or layers go,
#   which makes the network really smaller, or single weights.
# - **Surgery**: turning a masked network into a smaller ordinary one.
# - **Ticket**: a masked network with the initial (or an early) value of each
#   weight that is left. A *winning* one trains as well as the dense network.
# - **Train, valid, test**: what is learnt from; what decisions are taken on;
#   what is only ever reported.
