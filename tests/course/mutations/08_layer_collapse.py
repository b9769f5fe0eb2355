"""Mistakes that the checks of lesson 8's exercises must see."""

MUTATIONS = {
    "ex-08-1": [
        (
            "second.weight @ (d[:, None] * first.weight)",
            "d[:, None] * second.weight @ first.weight",
        ),
        ("d[:, None] * first.weight", "d[0] * first.weight"),
        ("d[:, None] * first.weight", "first.weight"),
        ("+ norm.eps).sqrt()", ").sqrt()"),
        (".sqrt()", ""),
        ("norm.bias - d * norm.running_mean", "norm.bias - norm.running_mean"),
        ("norm.bias - d * norm.running_mean", "norm.bias + d * norm.running_mean"),
        ("e = e + d * first.bias", "e = e + first.bias"),
        ("if first.bias is not None", "if first.bias is None"),
        ("second.weight @ e", "e.sum()"),
        ("if second.bias is not None:", "if False:"),
    ],
    "ex-08-2": [
        ("1 - new / old", "1 - old / new"),
        (
            "(k1 + k2 - 1) ** 2 * c_in * c_out\n    return",
            "(k1 + k2) ** 2 * c_in * c_out\n    return",
        ),
        ("k1**2 * c_in + k2**2 * c_out)", "k1 * c_in + k2 * c_out)"),
        ("k1**2 * c_in + k2**2 * c_out)", "k2**2 * c_in + k1**2 * c_out)"),
        ("new // each + 1", "new // each"),
        ("new // each + 1", "-(-new // each)"),
        ("new // each + 1", "new / each + 1"),
        (
            "(k1 + k2 - 1) ** 2 * c_in * c_out\n    each",
            "max(k1, k2) ** 2 * c_in * c_out\n    each",
        ),
    ],
    "ex-08-3": [
        ("clamp(max=0)", "clamp(min=0)"),
        ("torch.linalg.matrix_norm(second.weight, 2)", "second.weight.norm()"),
        ("torch.linalg.matrix_norm(second.weight, 2)", "second.weight.abs().max()"),
        (".norm(dim=1).max()", ".norm(dim=1).mean()"),
        (".norm(dim=1).max()", ".norm()"),
        ("1 - distance / worst", "1 - distance / worst**2"),
        ("max(0.0, 1 - distance / worst)", "(1 - distance / worst)"),
        (" if worst > 0 else 0.0", ""),
        (" if worst > 0 else 0.0", " if worst > 0 else 1.0"),
    ],
}
