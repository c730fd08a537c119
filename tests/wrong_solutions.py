"""Wrong solutions of the course's problems, as changes of the reference.

A change is a function's name, and a text in it and what comes in its place, perhaps several of
these; or a text alone, which is the function's whole body.
"""

from textwrap import indent

PLAIN, FAST = "cskv.BiBranchCache", "beyond/segments.FastCache"
DAMPING = "beyond/segments.damping"
ZEROS = "return LowRank(torch.zeros(W.shape[0], rank).to(W), torch.zeros(rank, W.shape[1]).to(W))"
HALF = "torch.cat([eigenvectors[:, : rank // 2 + 1], eigenvectors[:, rank // 2 + 1 - rank :]], 1)"
STRAIGHT = "torch.where(inside, stored + (x - x.detach()), stored)"


def method_body(text: str) -> str:
    return indent(text, " " * 8).strip()


VALUES = method_body("""
B, H, n = p.shape
values = self.c_v.read(begin, begin + n).float() @ self.B_v.float()  # [B, n, d_kv]
if self.v_bias is not None:
    values = values + self.v_bias
values = values.unflatten(-1, (self.H_kv, self.D)).transpose(1, 2)  # [B, H_kv, n, D]
return (p.reshape(B, self.H_kv, -1, n) @ values).flatten(0, 1)
""")
KEYS = method_body("""
tables = query_turns(rope, self.length - 1, self.sinks, spans, q.device)
begin, stop = spans[0].start, min(spans[-1].stop, self.c_k.length)
lengths = torch.tensor([span.length for span in spans for _ in range(span.count)])
cos, sin = (table.repeat_interleave(lengths, 0) for table in tables)  # of each token, [n, D]
for s in range(begin, stop, STEP):
    e = min(s + STEP, stop)
    keys = self.c_k.read(s, e).float() @ self.B_k.float()
    if self.k_bias is not None:
        keys = keys + self.k_bias
    keys = keys.unflatten(-1, (self.H_kv, self.D)).transpose(1, 2)  # [B, H_kv, e - s, D]
    some = slice(s - begin, e - begin)
    keys = keys * cos[some] + (keys * sin[some]).roll(self.D // 2, -1)
    scores = q.view(len(out), self.H_kv, -1, self.D) @ keys.transpose(-1, -2)
    out[..., some] = scores.flatten(1, 2)
""")
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
            "k[:, :, 0], v[:, :, 0]",
            "rope.rotate(k, 1)[:, :, 0], v[:, :, 0]",
        ),
        "sliding window forgotten": (f"{PLAIN}.decode", "self.sliding_window or t + 1", "t + 1"),
        "rebuilt keys from position 0": (
            f"{PLAIN}.attend",
            "self.k_bias), first)",
            "self.k_bias), 0)",
        ),
        "RoPE at the wrong stage": (f"{PLAIN}.decode", "q, k = rope", "q, _ = rope"),
        "bias forgotten": (f"{PLAIN}.attend", "hat + bias.float()", "hat"),
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
        "not damped": (DAMPING, "return torch.ones_like(w)"),
        "keys rebuilt at once": (f"{FAST}.old_scores", KEYS.replace("STEP", "10**6")),
        "values rebuilt": (f"{FAST}.old_values", VALUES),
        "one token too many": (
            DAMPING,
            "return (w * (length + 1) / 2).sin() / ((length + 1) * (w / 2).sin())",
        ),
        "half the turn": (DAMPING, "return (w * length / 4).sin() / (length * (w / 4).sin())"),
        "that of the last token": (DAMPING, "return (w * (length - 1) / 2).cos()"),
        "keys rebuilt in chunks": (f"{FAST}.old_scores", KEYS.replace("STEP", "self.chunk")),
        "turned the other way": (f"{FAST}.old_scores", "D // 2, -1), sin)", "D // 2, -1), -sin)"),
        "one turn for all": (
            f"{FAST}.old_scores",
            "M = len(cos)",
            "M = len(cos); cos, sin = cos[:1].expand_as(cos), sin[:1].expand_as(sin)",
        ),
        "neighbours as pairs": (f"{FAST}.old_scores", "q.roll(D // 2, -1)", "q.roll(1, -1)"),
        "heads in another order": (
            f"{FAST}.old_scores",
            "u.permute(1, 2, 0, 3, 4)",
            "u.permute(1, 2, 3, 0, 4)",
        ),
        "bias of keys forgotten": (f"{FAST}.old_scores", "self.k_bias is not None", "False"),
        "every part as the first": (f"{FAST}.old_scores", "done += part.count", "pass"),
        "every span at the same place": (
            f"{FAST}.old_scores",
            "at = part.start - spans[0].start",
            "at = 0",
        ),
        "no scores": (f"{FAST}.old_scores", "out.zero_()"),
        "bias of values forgotten": (f"{FAST}.old_values", "self.v_bias is not None", "False"),
        "bias of values in full": (f"{FAST}.old_values", "total *", "total / total *"),
        "values from the first token on": (f"{FAST}.old_values", "begin + s", "s"),
        "the last chunk only": (f"{FAST}.old_values", "sums + weighted_sum", "weighted_sum"),
        "zeros": (
            f"{FAST}.old_values",
            "return p.new_zeros(len(p) * self.H_kv, p.shape[1] // self.H_kv, self.D)",
        ),
    },
}
