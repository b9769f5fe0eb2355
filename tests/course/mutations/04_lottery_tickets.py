"""Mistakes that the checks of lesson 4's exercises must see."""

MUTATIONS = {
    "ex-04-1": [
        ("rate / 2 if", "rate if"),
        ("len(left) - 1", "0"),
        ("round(share * n)", "int(share * n)"),
        ("round(share * n)", "round(share * sizes[i])"),
        ("left = list(sizes)", "left = sizes"),
        ("range(rounds)", "range(rounds + 1)"),
        ("n - round(share * n)", "round((1 - share) * n)"),
    ],
    "ex-04-2": [
        ("trained.abs()", "trained"),
        ("trained.abs()", "initial.abs()"),
        ('.masked_fill(~kept, float("inf"))', ""),
        ("int(kept.sum())", "kept.numel()"),
        ("round(rate * int(kept.sum()))", "round(rate * int(kept.sum())) + 1"),
        ("mask = kept.clone(memory_format=torch.contiguous_format)", "mask = kept"),
        (
            "mask = kept.clone(memory_format=torch.contiguous_format)",
            "mask = torch.ones_like(kept)",
        ),
        ("initial * mask", "trained * mask"),
        ("argsort()", "argsort(descending=True)"),
    ],
    "ex-04-3": [
        ("weight.detach().abs()", "weight.detach()"),
        ("size @ below[-1]", "size.square() @ below[-1]"),
        ("size.T @ above[0]", "above[0] * 1.0 + 0 * size.T.sum(1)[:1]"),
        ("up[:, None] * size * down", "up[:, None] * down * torch.ones_like(size)"),
        ("up[:, None] * size * down", "size * down"),
        ("up[:, None] * size * down", "up[:, None] * size"),
        ("sizes[:0:-1]", "sizes[::-1]"),
        ("weight.detach().abs()", "weight.detach().abs_()"),
    ],
}
