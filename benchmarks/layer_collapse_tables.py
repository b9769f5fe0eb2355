"""The architectural columns of the LayerCollapse paper's tables, counted without any weights.

    python benchmarks/layer_collapse_tables.py

Parameters and multiply-adds before and after the collapse, Tables 1 to 6 of the paper, next to
what `layer_collapse.collapsed_counts` gives on the meta device. GPT-2 and BERT are built here from
their dimensions, the rest is torchvision's and timm's. Nothing is trained, nothing is timed.

The paper does not say how it counts MACs. Its figures for GPT-2 and BERT come out with attention
products and 128 tokens; those for images only without attention products, and those of Table 4 to
the last digit only if norms, ReLUs and poolings count one for each number they read.

Structure of `results/layer_collapse_tables.json`::

    rows[]
      .table .model .collapsed   number of pairs, or "all"
      .paper                     as printed: parameters_millions and macs_billions as
                                 [before, after], parameters_saved and macs_saved in percent
      .ours                      the same keys to the same digits
      .counting                  "footprint" (as `core.measure.footprint` counts), "layers" (without
                                 attention products) or "elementwise" (layers, and those as well)
      .footprint                 counts: parameters and macs as [before, after], unrounded
      .differs                   the keys in which `ours` and `paper` are not equal
      .note                      what is known of the difference, or of how it was resolved
    equal, compared              printed figures that come out, and all of them
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from common import RESULTS, write
from torch import Tensor, nn

from pruning101.core.tracing import hooked
from pruning101.layer_collapse import collapsed_counts

# --- GPT-2 and BERT, from their dimensions -----------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        heads = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v  # [B, heads, T, 64]
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """The dimensions of GPT-2 (a head that shares the embedding) and BERT (a pooler).

    Where norms stand differs between the two, and changes no count.
    """

    def __init__(
        self, layers: int, width: int, tokens: int, positions: int, segments: int = 0
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.empty(positions, width))
        self.segments = nn.Embedding(segments, width) if segments else None
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.pooler = nn.Linear(width, width) if segments else None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(tokens) + self.positions[: tokens.shape[1]]))
        if self.pooler is not None:
            return self.pooler(x[:, 0])
        return F.linear(x, self.tokens.weight)


def gpt2(layers: int, width: int) -> nn.Module:
    return LanguageModel(layers, width, 50257, 1024)


def bert(layers: int, width: int) -> nn.Module:
    return LanguageModel(layers, width, 30522, 512, segments=2)


def vgg_small(name: str, classes: int, size: int) -> nn.Module:
    """Table 6: convolutions of VGG, and a classifier of two layers."""
    features = getattr(torchvision.models, name)().features
    flat = 512 * (size // 32) ** 2
    classifier = [nn.Linear(flat, 4096), nn.ReLU(), nn.Linear(4096, classes)]
    return nn.Sequential(features, nn.Flatten(), *classifier)


# --- counting as the paper did for images ------------------------------------------------------

_ELEMENTWISE = (nn.LayerNorm, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


def layers_only(model: nn.Module, example: Any, *, elementwise: bool = False) -> int:
    """MACs of linear layers and convolutions; if asked for, one for each input of other layers."""
    total = 0

    def leave(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif elementwise:
            total += args[0].numel()

    kinds = (nn.Linear, nn.Conv2d, *_ELEMENTWISE)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    with hooked(modules, lambda name: lambda *_: None, leave), torch.no_grad():
        model(*example)
    return total


# --- the paper's figures ------------------------------------------------------------------------

Row = tuple[int, str, Callable[[], nn.Module], int | None, dict[str, Any], str]
_TIMM = partial(partial, timm.create_model)
_VGG = {n: getattr(torchvision.models, f"vgg{n}") for n in (11, 13, 16, 19)}


def saved(parameters: float, macs: float) -> dict[str, Any]:
    return {"parameters_saved": parameters, "macs_saved": macs}


def size(before: float, after: float, *macs: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"parameters_millions": [before, after]}
    return figures | ({"macs_billions": list(macs)} if macs else {})


LAYERDROP_BASE = (
    "one whole MLP less, as LayerDrop's row says, gives 119.7 M; the paper prints 119.9 M"
)
LAYERDROP_LARGE = "three whole MLPs less, as LayerDrop's row says, give 734.7 M, as printed"
BERT_BASE = (
    "unexplained, but 16.5 M less is what four MLPs give; 109.1 M is the size without the 512 "
    "position embeddings, from which 92.6 M would be left"
)
BERT_LARGE = (
    "unexplained: four MLPs are 29.4 M, the paper's difference is 25.2 M, as if 2 x 1024 x 1024 "
    "weights of each were left where one layer has 1024 x 1024"
)
VIT_T = "unexplained: the same counting gives the other figures of this table, and here 0.92 G"
VGG_19 = "29.6 M is unexplained: the classifier that gives all other figures gives 29.2 M"

IMAGES, WORDS = (1, 3, 224, 224), (1, 128)
ROWS: list[Row] = [
    (1, "GPT2-Large", partial(gpt2, 36, 1280), None, saved(53.4, 52.7), "128 tokens, head counted"),
    (1, "Bert-Large", partial(bert, 24, 1024), None, saved(52.6, 57.1), "128 tokens"),
    (1, "ViT L/16", _TIMM("vit_large_patch16_224"), None, saved(57.9, 58.2), ""),
    (1, "Mixer L/16", _TIMM("mixer_l16_224"), None, saved(86.5, 86.5), ""),
    (1, "VGG 16", _VGG[16], None, saved(71.2, 0.6), ""),
    (2, "GPT-2", partial(gpt2, 12, 768), 1, size(124.4, 120.3), LAYERDROP_BASE),
    (2, "GPT-2 Large", partial(gpt2, 36, 1280), 3, size(774.0, 739.6), LAYERDROP_LARGE),
    (3, "Bert Base", partial(bert, 12, 768), 4, size(109.1, 92.5), BERT_BASE),
    (3, "Bert Large", partial(bert, 24, 1024), 4, size(334.9, 309.7), BERT_LARGE),
    (4, "ViT T/16", _TIMM("vit_tiny_patch16_224"), 3, size(5.72, 4.94, 1.08, 0.91), VIT_T),
    (4, "ViT S/16", _TIMM("vit_small_patch16_224"), 2, size(22.05, 19.98, 4.24, 3.84), ""),
    (4, "ViT B/16", _TIMM("vit_base_patch16_224"), 2, size(86.57, 78.30, 16.85, 15.23), ""),
    (4, "ViT L/16", _TIMM("vit_large_patch16_224"), 2, size(304.33, 289.64, 59.66, 56.77), ""),
    (4, "Mixer B/16", _TIMM("mixer_b16_224"), 4, size(59.88, 51.39, 12.61, 10.81), "two blocks"),
    (4, "VGG19", _VGG[19], 2, size(143.67, 45.11, 19.65, 19.55), ""),
    (4, "VGG11", _VGG[11], 2, size(132.86, 34.31, 7.62, 7.52), ""),
    (5, "vgg19", _VGG[19], None, size(143.67, 45.11), ""),
    (5, "vgg16", _VGG[16], None, size(138.36, 39.80), ""),
    (5, "vgg13", _VGG[13], None, size(133.05, 34.49), ""),
    (5, "vgg11", _VGG[11], None, size(132.86, 34.31), ""),
]
for name, cifar, tiny in (
    ("vgg11", (11.7, 9.3), (18.4, 9.6)),
    ("vgg13", (11.9, 9.5), (18.6, 9.8)),
    ("vgg16", (17.2, 14.8), (23.9, 15.1)),
    ("vgg19", (22.5, 20.1), (29.6, 20.4)),
):
    how = "the paper does not give the classifier; 512-4096-100 comes out"
    ROWS.append(
        (6, f"{name}, CIFAR-100", partial(vgg_small, name, 100, 32), None, size(*cifar), how)
    )
    how = "the paper does not give the classifier; 2048-4096-200 comes out"
    how = VGG_19 if name == "vgg19" else how
    ROWS.append(
        (6, f"{name}, Tiny ImageNet", partial(vgg_small, name, 200, 64), None, size(*tiny), how)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "layer_collapse_tables.json")
    options = parser.parse_args()
    rows = [row(*given) for given in ROWS]
    for r in rows:
        print(r["table"], r["model"], r["paper"], r["ours"], r["differs"] or "", sep="  ")
    compared = [(value, r["ours"][key]) for r in rows for key, value in r["paper"].items()]
    pairs = [
        pair
        for paper, ours in compared
        for pair in (zip(paper, ours, strict=True) if isinstance(paper, list) else [(paper, ours)])
    ]
    equal = sum(paper == ours for paper, ours in pairs)
    write(options.out.resolve(), {"rows": rows, "equal": equal, "compared": len(pairs)})


def row(
    table: int,
    name: str,
    build: Callable[[], nn.Module],
    last: int | None,
    paper: dict[str, Any],
    note: str,
) -> dict[str, Any]:
    with torch.device("meta"):
        model = build()
        words = isinstance(model, LanguageModel)
        shape = (1, 3, model_size(name), model_size(name)) if table == 6 else IMAGES
        example = torch.empty(WORDS, dtype=torch.int64) if words else torch.empty(shape)
    counting = "footprint" if words else "layers" if table == 1 else "elementwise"
    plain = counts = collapsed_counts(model, example, last=last)
    if not words:
        count = partial(layers_only, elementwise=counting == "elementwise")
        counts = collapsed_counts(model, example, last=last, count=count)
    ours: dict[str, Any] = {}
    for key, value in paper.items():
        exact = {
            "parameters_saved": 100 * counts.parameters_saved,
            "macs_saved": 100 * counts.macs_saved,
            "parameters_millions": [counts.parameters_before / 1e6, counts.parameters_after / 1e6],
            "macs_billions": [counts.macs_before / 1e9, counts.macs_after / 1e9],
        }[key]
        digits = 1 if key.endswith("saved") or table in (2, 3, 6) else 2
        ours[key] = (
            [round(x, digits) for x in exact] if isinstance(value, list) else round(exact, digits)
        )
    return {
        "table": table,
        "model": name,
        "collapsed": last or "all",
        "paper": paper,
        "ours": ours,
        "counting": counting,
        "footprint": {
            "parameters": [plain.parameters_before, plain.parameters_after],
            "macs": [plain.macs_before, plain.macs_after],
            "parameters_saved": plain.parameters_saved,
            "macs_saved": plain.macs_saved,
        },
        "differs": [key for key in paper if paper[key] != ours[key]],
        "note": note,
    }


def model_size(name: str) -> int:
    return 64 if "Tiny" in name else 32


if __name__ == "__main__":
    main()
