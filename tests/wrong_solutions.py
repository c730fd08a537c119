"""Wrong solutions of the course's problems, by function, as changes of the reference.

A change is a text in the function and what comes in its place, or the function's whole body. The
first change of every function is tried in a quick run of the tests.
"""

PLAIN = "cskv.BiBranchCache"
FAST = "beyond/segments.FastCache"
ZEROS = "return LowRank(torch.zeros(W.shape[0], rank).to(W), torch.zeros(rank, W.shape[1]).to(W))"
HALF = "torch.cat([eigenvectors[:, : rank // 2 + 1], eigenvectors[:, rank // 2 + 1 - rank :]], 1)"
STRAIGHT = "torch.where(inside, stored + (x - x.detach()), stored)"
VALUES = """B, H, n = p.shape
values = self.c_v.read(begin, begin + n).float() @ self.B_v.float()  # [B, n, d_kv]
values = values if self.v_bias is None else values + self.v_bias
values = values.unflatten(-1, (self.H_kv, self.D)).transpose(1, 2)  # [B, H_kv, n, D]
return (p.reshape(B, self.H_kv, -1, n) @ values).flatten(0, 1)
"""
KEYS = """tables = middles(rope, self.sinks, spans, q.device)
begin, stop = spans[0].start, min(spans[-1].stop, self.c_k.length)
lengths = torch.tensor([span.length for span in spans for _ in range(span.count)])
cos, sin = (table.repeat_interleave(lengths, 0) for table in tables)  # [n, D]
for s in range(begin, stop, self.chunk):
    e = min(s + self.chunk, stop)
    keys = self.c_k.read(s, e).float() @ self.B_k.float()
    keys = keys if self.k_bias is None else keys + self.k_bias
    keys = keys.unflatten(-1, (self.H_kv, self.D)).transpose(1, 2)  # [B, H_kv, e - s, D]
    some = slice(s - begin, e - begin)
    keys = keys * cos[some] + (keys * sin[some]).roll(self.D // 2, -1)
    out[..., some] = (q.view(len(out), self.H_kv, -1, self.D) @ keys.mT).flatten(1, 2)
"""
BY_32 = "grouping = Grouping(grouping.dim, 32, grouping.clamped)\n    "
UNCLAMPED = "grouping = Grouping(grouping.dim, grouping.size)\n    "
MSE = "F.mse_loss(k_hat, k.to(dtype))"
WRONG = {
    "model.LayerCache.nbytes": {
        "only what is used": ("untyped_storage().nbytes()", "nbytes"),
        "zero": "return 0",
        "of one tensor": ("self.tensors()", "self.tensors()[:1]"),
    },
    "quant.bits_per_element": {
        "short groups are free": ("-(-length // size)", "length // size"),
        "no minimum": ("2 * 16", "16"),
        "one size only": "return bits + 1",
    },
    "infer.full_bytes": {
        "keys only": ("2 * 2 *", "2 *"),
        "one layer": ("model.config.num_hidden_layers", "1"),
        "room for a block": ("* tokens", "* (-(-tokens // 32) * 32)"),
    },
    "infer.nominal_ratio": {
        "bits forgotten": ("pair.bits_a_token", "pair.rank * 16"),
        "kept, not removed": ("return 1 - ", "return "),
    },
    "cskv.svd_factors": {
        "no root": ("S[:rank].sqrt()", "S[:rank]"),
        "all in A": ("* root, root[:, None] *", "* S[:rank],"),
        "the last ones": ("U[:, :rank]", "U[:, -rank:]"),
        "in float64": ("(W, full_matrices", "(W.double(), full_matrices"),
        "zeros": ZEROS,
    },
    "cskv.asvd_factors": {
        "not scaled back": ("scaled.A / scale[:, None]", "scaled.A"),
        "alpha forgotten": ("x_abs.pow(alpha)", "x_abs"),
        "divides by zero": (" + 1e-6", ""),
        "A in float64": ("scaled.A / scale", "scaled.A.double() / scale"),
    },
    "cskv.optimal_factors": {
        "half the ranks swapped": ("eigenvectors[:, -rank:].flip(1)", HALF),
        "svd instead": "return svd_factors(W, rank)",
        "metric forgotten": ("if metric is None:", "if True:"),
        "L on the wrong side": ("L.T @ moment", "L @ moment"),
        "A in float64": ("LowRank(W @ V_r, V_r.T", "LowRank(W.double() @ V_r.double(), V_r.T"),
        "in float64": ("V_r.T.contiguous())", "V_r.T.double())"),
    },
    f"{PLAIN}.decode": {
        "old tokens dropped": ("k_hat, self.k[:, :, S:]]", "k_hat * 0, self.k[:, :, S:]]"),
        "key at the next position": ("rope.rotate(k, t)", "rope.rotate(k, t + 1)"),
        "RoPE at the wrong stage": ("rope.rotate(q, t)", "q"),
        "rebuilt keys from position 0": ("rope.rotate(k_hat, first_old)", "rope.rotate(k_hat, 0)"),
        "sinks have latents": ("if t >= self.sinks:", "if True:"),
        "sinks are seen for ever": ("self.k[:, :, first_sink:S]", "self.k[:, :, :S]"),
        "zeros": "return torch.zeros_like(q)",
        "the query": "return q",
        "one head only": ("enable_gqa=True", "enable_gqa=False"),
        "in float64": ("enable_gqa=True)", "enable_gqa=True).double()"),
        "rebuilt keys in float32": ("first_old).to(k.dtype)", "first_old)"),
        "rebuilt values in float32": ("window_start).to(v.dtype)", "window_start)"),
    },
    f"{PLAIN}.branches": {
        "window too short by one": ("self.length - self.window", "self.length - self.window + 1"),
        "window too long by one": ("self.length - self.window", "self.length - self.window - 1"),
        "sliding window forgotten": ("self.sliding_window or self.length", "self.length"),
    },
    f"{PLAIN}.sinks_and_window": {
        "window too long by one": ("-self.window :", "-self.window - 1 :"),
        "sinks in the window": ("others[:, :, -self", "y[:, :, -self"),
        "a view of a larger tensor": ("dim=2)", "dim=2).repeat(2, 1, 1, 1)[: len(y)]"),
    },
    f"{PLAIN}.rebuild": {
        "sinks have latents": ("first - self.sinks, old - self.sinks", "first, old"),
        "bias forgotten": ("y + bias.float()", "y"),
        "latents not cast": ("c.float() @ B.float()", "c @ B"),
        "channels in another order": ("(-1, self.D)).tran", "(self.D, -1)).mT.tran"),
    },
    f"{PLAIN}.remember": {
        "sinks have latents": ("x[:, self.sinks :]", "x"),
        "kept before the length is known": (
            "self.length = x.shape[1]\n        self.keep(rope.rotate(k, 0), v)",
            "self.keep(rope.rotate(k, 0), v)\n        self.length = x.shape[1]",
        ),
        "the prompt's keys changed": ("rope.rotate(k, 0)", "k.copy_(rope.rotate(k, 0))"),
    },
    "quant.group_limits": {
        "wrong axis of limits": ("n = x.shape[dim]", "dim = -1\n    n = x.shape[dim]"),
        "limits rounded inwards": ("minimum = round_down(low)", "minimum = low.half()"),
        "2^bits steps": ("levels = 2**bits - 1", "levels = 2**bits"),
        "zero-point not clamped": (".round().clamp(0, levels)", ".round()"),
        "groups of 32": (", grouping.size\n", ", 32\n"),
        "clamped in float32": ("(-zero * scale.float()).half()", "-zero * scale.float()"),
        "clamped scale in float32": (".clamp(min=2**-24).half()", ".clamp(min=2**-24)"),
    },
    "quant.quantize": {
        "wrong axis of codes": (", grouping)\n    n", ", Grouping(TOKENS))\n    n"),
        "missing clamp": (".round().clamp(0, 2**bits - 1)", ".round()"),
        "down, not to the nearest": (".round()", ".floor()"),
        "groups of 32": ("n = x.shape", f"{BY_32}n = x.shape"),
        "x changed": ("(x.float() - low)", "x.float().sub_(low)"),
        "codes in int16": ("torch.uint8", "torch.int16"),
    },
    "quant.dequantize": {
        "short group forgotten": ("(whole, 1, rest))", ")"),
        "minimum forgotten": (".add_(low)", ""),
        "`out` ignored": ("if out is None:", "if True:"),
        "`out` used as it is": ("_(q.codes)", "_(q.codes) if out.numel() % 7 else None"),
        "groups of 32": ("grouping.size", "32"),
        "in float16": ("return out", "return out.half()"),
    },
    "quant.fake_quantize": {
        "gradient beyond the levels": (STRAIGHT, "stored + (x - x.detach())"),
        "x itself": "return x * 1",
        "in float32": ("grouping).to(x.dtype)", "grouping); x = x.float()"),
        "groups of 32": ("with torch", f"{BY_32}with torch"),
        "clamped forgotten": ("with torch", f"{UNCLAMPED}with torch"),
    },
    "quant.pack": {
        "other order of tokens": ("part << (i * width)", "part << (8 - width - i * width)"),
        "not packed": "return codes",
        "in int32": ("(-3, -2)", "(-3, -2).int()"),
    },
    "quant.unpack": {
        "four bits only": "return torch.cat([packed & 15, packed >> 4], -2)",
        "in int32": ("view(torch.uint8).view", "view(torch.uint8).int().view"),
        "one sequence only": ("*packed.shape[:TOKENS]", "packed.shape[0]"),
    },
    "train.layer_loss": {
        "sum, not mean": ("k.to(dtype))", 'k.to(dtype), reduction="sum")'),
        "zero": "return ((x @ pair.A) @ pair.B).sum() * 0",
        "not rounded": ("pair.bits < 16", "False"),
        "clamped forgotten": ("pair.grouping(dim)", "quant.Grouping(dim)"),
        "wrong axis": ("pair.grouping(dim)", "pair.grouping(quant.CHANNELS)"),
        "in float32": ("k_hat = c", "dtype = torch.float32; k_hat = c"),
        "the square taken apart": (MSE, "(k.square() - 2 * k * k_hat + k_hat.square()).mean()"),
        "sums of squares": (MSE, "k.square().mean() - (2 * k * k_hat - k_hat**2).mean()"),
        "groups of 32": ("pair.grouping(dim)", "quant.Grouping(dim, clamped=pair.clamped)"),
        "always in float64": ("k_hat = c", "dtype = torch.float64; k_hat = c"),
    },
    "train.loss_floor": {
        "one eigenvalue too few": ("- rank]", "- rank - 1]"),
        "largest eigenvalues": ("[: len(moment) - rank]", "[rank:]"),
        "mere rounding": ("dropped * (", "dropped + 0 * ("),
    },
    "train.Tuner.step": {
        "gradients pile up": ("self.optimizer.zero_grad(set_to_none=False)", "pass"),
        "rate does not fall": ("self.rate(self.steps_done)", "self.lr"),
        "steps not counted": ("self.steps_done += 1", "pass"),
        "other processes forgotten": ("summed(parameter.grad)", "pass"),
        "of one parameter only": ("in self.parameters:", "in self.parameters[:1]:"),
        "gradients are None": ("set_to_none=False", "set_to_none=True"),
    },
    "beyond/segments.damping": {
        "not damped": "return torch.ones_like(w)",
        "one token too many": "n = length + 1; return (w * n / 2).sin() / (n * (w / 2).sin())",
        "half the turn": "return (w * length / 4).sin() / (length * (w / 4).sin())",
        "that of the last token": "return (w * (length - 1) / 2).cos()",
    },
    f"{FAST}.old_scores": {
        "turned the other way": ("turn(q, cos, sin)", "turn(q, cos, -sin)"),
        "keys rebuilt in chunks": KEYS,
        "one turn for all": ("turn(q, cos, sin)", "turn(q, cos[:1] + 0 * cos, sin[:1] + 0 * sin)"),
        "neighbours as pairs": ("turn(q, cos, sin)", "torch.addcmul(q * cos, q.roll(1, -1), sin)"),
        "heads in another order": ("permute(1, 2, 0, 3)", "permute(1, 2, 0, 3).flip(2)"),
        "bias of keys forgotten": ("self.k_bias is not None", "False"),
        "every part as the first": ("done += m", "pass"),
        "every span at the same place": ("part.start - begin", "0"),
        "no scores": "out.zero_()",
        "q in the type of B": ("to(self.dtype).reshape", "to(torch.float64).reshape"),
    },
    f"{FAST}.old_values": {
        "values rebuilt": VALUES,
        "bias of values forgotten": ("self.v_bias is not None", "False"),
        "bias of values in full": ("total *", "total / total *"),
        "values from the first token on": ("begin + s, begin + s + m", "s, s + m"),
        "the last chunk only": ("c) + sums", "c)"),
        "zeros": "return p.new_zeros(len(p) * self.H_kv, p.shape[1] // self.H_kv, self.D)",
    },
}
