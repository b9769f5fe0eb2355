"""Mistakes that the checks of lesson 3's exercises must see."""

MUTATIONS = {
    "ex-03-1": [
        ("weight.abs().flatten()", "weight.flatten()"),
        ("sizes[gone].item()", "sizes[gone - 1].item()"),
        ("sort().values", "sort(descending=True).values"),
        ('float("inf") if gone == len(sizes)', "sizes[-1].item() if gone == len(sizes)"),
        ("round(sparsity * len(sizes))", "int(sparsity * len(sizes))"),
        ("weight.abs().flatten()", "weight.abs().view(-1)"),
    ],
    "ex-03-2": [
        ("> drop", ">= drop"),
        ("            break\n", "            continue\n"),
        ("accuracies[0] - value", "max(accuracies) - value"),
        ("best = sparsity\n", "best = value\n"),
        ("return best", "return sparsities[-1]"),
    ],
    "ex-03-3": [
        (".relu()\n", "\n"),
        ("second.bias + shift", "second.bias - shift"),
        ("second.bias + shift", "second.bias"),
        ("has_inputs & has_outputs", "has_inputs"),
        ("has_inputs & has_outputs", "has_outputs"),
        ("small.bias.copy_(first.bias[alive])", "small.bias.zero_()"),
        ("first.bias[~has_inputs]", "first.bias[has_inputs]"),
    ],
}
