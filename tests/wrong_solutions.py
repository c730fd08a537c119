"""Wrong solutions of the course's problems, as changes of the reference.

A change is a function's name, and a text in it and what comes in its place, perhaps several of
these; or a text alone, which is the function's whole body.
"""

PLAIN, FAST = "cskv.BiBranchCache", "cskv.ChunkedBiBranchCache"
ZEROS = "return LowRank(torch.zeros(W.shape[0], rank).to(W), torch.zeros(rank, W.shape[1]).to(W))"
HALF = "torch.cat([eigenvectors[:, : rank // 2 + 1], eigenvectors[:, rank // 2 + 1 - rank :]], 1)"
STRAIGHT = "torch.where(inside, stored + (x - x.detach()), stored)"
REBUILT = """p_old[..., s - first : e - first].view(B, self.H_kv, -1, e - s) @ (
    self.c_v.read(s - S, e - S).to(p.dtype)[:, None] @ self.B_v
)"""
WRONG = {
    "a": {
        "only what is used": ("model.LayerCache.nbytes", "untyped_storage().nbytes()", "nbytes"),
        "zero": ("model.LayerCache.nbytes", "return 0"),
        "short groups are free": ("quant.bits_per_element", "-(-size // GROUP)", "(size // GROUP)"),
        "no minimum": ("quant.bits_per_element", "2 * 16", "16"),
        "one size only": ("quant.bits_per_element", "return bits + 1"),
        "keys only": ("infer.full_bytes", "2 * 2 *", "2 *"),
        "bits forgotten": ("infer.nominal_ratio", "pair.rank * pair.bits", "pair.rank * 16"),
        "kept, not removed": ("infer.nominal_ratio", "return 1 - ", "return "),
    },
    "b": {
        "no root": ("cskv.svd_factors", "S[:rank].sqrt()", "S[:rank]"),
        "all in A": ("cskv.svd_factors", "* root, root[:, None] *", "* S[:rank],"),
        "the last ones": ("cskv.svd_factors", "U[:, :rank]", "U[:, -rank:]"),
        "zeros": ("cskv.svd_factors", ZEROS),
        "not scaled back": ("cskv.asvd_factors", "scaled.A / scale[:, None]", "scaled.A"),
        "alpha forgotten": ("cskv.asvd_factors", "x_abs.pow(alpha)", "x_abs"),
        "divides by zero": ("cskv.asvd_factors", " + 1e-6", ""),
        "half the ranks swapped": (
            "cskv.optimal_factors",
            "eigenvectors[:, -rank:].flip(1)",
            HALF,
        ),
        "svd instead": ("cskv.optimal_factors", "return svd_factors(W, rank)"),
        "metric forgotten": ("cskv.optimal_factors", "if metric is not None:", "if False:"),
        "L on the wrong side": ("cskv.optimal_factors", "L.T @ moment", "L @ moment"),
    },
    "c": {
        "window too short by one": (
            f"{PLAIN}.decode",
            "t + 1 - S, self.window)",
            "t - S, self.window - 1)",
        ),
        "window too long by one": (f"{PLAIN}.decode", "t + 1 - m", "t + 2 - m"),
        "ring off by one": (
            f"{PLAIN}.decode",
            "(t - self.sinks) % self.window",
            "(t + 1) % self.window",
        ),
        "key at the next position": (
            f"{PLAIN}.decode",
            "rope.rotate(k, t)",
            "rope.rotate(k, t + 1)",
        ),
        "sliding window forgotten": (f"{PLAIN}.decode", "self.sliding_window or t + 1", "t + 1"),
        "rebuilt keys from position 0": (
            f"{PLAIN}.attend",
            "self.k_bias), first)",
            "self.k_bias), 0)",
        ),
        "RoPE at the wrong stage": (f"{PLAIN}.decode", "rope.rotate(k, t)[:, :, 0]", "k[:, :, 0]"),
        "bias forgotten": (f"{PLAIN}.attend", "B.T, bias)", "B.T)"),
        "zeros": (f"{PLAIN}.attend", "return torch.zeros_like(q)"),
        "the query": (f"{PLAIN}.attend", "return q"),
        "old tokens dropped": (
            f"{PLAIN}.attend",
            "return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)",
        ),
        "sinks have latents": (f"{PLAIN}.remember", "x[:, self.sinks :]", "x"),
        "the prompt's keys changed": (
            f"{PLAIN}.remember",
            "k = rope.rotate(k, 0)",
            "k = k.copy_(rope.rotate(k, 0))",
        ),
        "one head only": (f"{PLAIN}.attend", "enable_gqa=True", "enable_gqa=False"),
    },
    "d": {
        "wrong axis of limits": (
            "quant.group_limits",
            "n = x.shape[dim]",
            "dim = -1\n    n = x.shape[dim]",
        ),
        "wrong axis of codes": (
            "quant.quantize",
            "limits = ",
            "dim = -2\n    limits = ",
        ),
        "missing clamp": ("quant.quantize", ".round().clamp(0, 2**bits - 1)", ".round()"),
        "down, not to the nearest": ("quant.quantize", ".round()", ".floor()"),
        "limits rounded inwards": (
            "quant.group_limits",
            "minimum = round_down(low)",
            "minimum = low.half()",
        ),
        "2^bits steps": ("quant.group_limits", "levels = 2**bits - 1", "levels = 2**bits"),
        "zero-point not clamped": ("quant.group_limits", ".round().clamp(0, levels)", ".round()"),
        "short group forgotten": ("quant.dequantize", "if rest:", "if False:"),
        "minimum forgotten": ("quant.dequantize", "groups.add_", "groups.clone().add_"),
        "gradient beyond the levels": (
            "quant.fake_quantize",
            STRAIGHT,
            "stored + (x - x.detach())",
        ),
        "x itself": ("quant.fake_quantize", "return x * 1"),
        "other order of tokens": (
            "quant.pack",
            "part << (i * width)",
            "part << ((per_byte - 1 - i) * width)",
        ),
        "not packed": ("quant.pack", "return codes"),
        "four bits only": ("quant.unpack", "return torch.cat([packed & 15, packed >> 4], -2)"),
    },
    "e": {
        "sum, not mean": ("train.layer_loss", "k.to(dtype))", 'k.to(dtype), reduction="sum")'),
        "zero": ("train.layer_loss", "return ((x @ pair.A) @ pair.B).sum() * 0"),
        "not rounded": ("train.layer_loss", "pair.bits < 16", "False"),
        "clamped forgotten": ("train.layer_loss", "**pair.quantizer(dim)", "dim"),
        "wrong axis": ("train.layer_loss", "**pair.quantizer(dim)", "-1, pair.clamped"),
        "in float32": (
            "train.layer_loss",
            "c.to(dtype) @ pair.B.to(dtype), k.to(dtype)",
            "c @ pair.B, k",
        ),
        "one eigenvalue too few": ("train.loss_floor", "- rank]", "- rank - 1]"),
        "largest eigenvalues": ("train.loss_floor", "[: len(moment) - rank]", "[rank:]"),
        "mere rounding": ("train.loss_floor", "dropped * (", "dropped + 0 * ("),
        "gradients pile up": (
            "train.Tuner.step",
            "self.optimizer.zero_grad(set_to_none=False)",
            "pass",
        ),
        "rate does not fall": ("train.Tuner.step", "= self.rate", "= self.lr"),
        "steps not counted": ("train.Tuner.step", "self.steps_done += 1", "pass"),
    },
    "f": {
        "positions start at each chunk": (
            f"{FAST}.old_scores",
            "rope.cis[s : s + n, None",
            "rope.cis[:n, None",
        ),
        "last chunk lost": (
            f"{FAST}.attend",
            "range(first, old, self.chunk)",
            "range(first, old - self.chunk + 1, self.chunk)",
        ),
        "all at once": (
            f"{FAST}.attend",
            "chunks = [",
            "chunks = [(first, old)] if n else []\n        _ = [",
        ),
        "not scaled": (f"{FAST}.attend", " / math.sqrt(D)", ""),
        "bias forgotten": (f"{FAST}.attend", "if self.v_bias is not None:", "if False:"),
        "zeros": (f"{FAST}.attend", "return torch.zeros_like(q)"),
        "values rebuilt": (
            f"{FAST}.attend",
            "p_old[..., s - first : e - first] @ self.c_v.read(s - S, e - S).to(p.dtype)",
            REBUILT,
            "p_c.view(B, self.H_kv, -1, p_c.shape[-1]) @ self.B_v",
            "p_c",
        ),
    },
}
