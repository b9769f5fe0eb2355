"""Mistakes that the checks of lesson 5's exercises must see."""

MUTATIONS = {
    "ex-05-1": [
        ("weight.abs().flatten", "weight.flatten"),
        ("weight.abs()", "weight.abs().amax(-1)"),
        ("weight.abs().flatten(1)", "weight.abs().view(len(weight), -1)"),
        ("sort(stable=True)", "sort(descending=True, stable=True)"),
        (
            "norms.sort(stable=True).indices",
            "(norms.flip(0).sort(stable=True).indices * -1 + len(norms) - 1)",
        ),
        (".sort().values", ""),
        ("len(norms) - count :", "len(norms) - count - 1 :"),
        ("ranked[len(norms) - count :]", "ranked[:count]"),
    ],
    "ex-05-2": [
        ("weight.transpose(0, 1) for", "weight.transpose(0, -1) for"),
        ("weight.abs()", "weight"),
        ("weight.abs()", "weight.square()"),
        (".mean(0)", ".sum(0)"),
        (".mean(0)", ".mean(1)"),
        (".flatten(1).sum(1)", ".flatten(1).mean(1)"),
        ("slices += ", "slices = "),
        ("torch.stack(norms).mean(0)", "torch.stack([norms[0], norms[-1]]).mean(0)"),
    ],
    "ex-05-3": [
        (".all(1)", ".any(1)"),
        ("0.0 if first.bias is None else first.bias", "0.0"),
        (" + norm.eps", " + 1e-1"),
        ("norm.running_var", "norm.running_var.square()"),
        ("(enters - norm.running_mean)", "enters"),
        (" * slope", ""),
        (".relu()", ""),
        (" @ emitted[dead]", " @ emitted[dead].neg()"),
        ("second.bias + shift", "second.bias"),
        ("shift if second.bias is None else second.bias + shift", "shift"),
        ("second.weight[:, ~dead]", "second.weight[:, : int((~dead).sum())]"),
    ],
}
