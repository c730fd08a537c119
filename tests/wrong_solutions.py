"""Wrong solutions of the course's problems, by function, as changes of the reference.

A change is a text in the function and what comes in its place, or the function's whole body. The
first change of every function is tried in a quick run of the tests.
"""

PLAIN = "cskv.BiBranchCache"
FAST = "beyond/segments.FastCache"
BY_32 = "grouping = Grouping(grouping.dim, 32, grouping.clamped)\n    "
WRONG = {
    "model.LayerCache.nbytes": {
        "only what is used": ("untyped_storage().nbytes()", "nbytes"),
        "of one tensor": ("self.tensors()", "self.tensors()[:1]"),
    },
    "quant.bits_per_element": {
        "short groups are free": ("-(-length // size)", "length // size"),
        "no minimum": ("2 * 16", "16"),
    },
    "infer.full_bytes": {
        "one layer": ("model.config.num_hidden_layers", "1"),
        "room for a block": ("* tokens", "* (-(-tokens // 32) * 32)"),
    },
    "infer.nominal_ratio": {"bits forgotten": ("pair.bits_a_token", "pair.rank * 16")},
    "cskv.svd_factors": {
        "no root": ("S[:rank].sqrt()", "S[:rank]"),
        "all in A": ("* root, root[:, None] *", "* S[:rank],"),
        "in float64": ("(W, full_matrices", "(W.double(), full_matrices"),
    },
    "cskv.asvd_factors": {
        "alpha forgotten": ("x_abs.pow(alpha)", "x_abs"),
        "divides by zero": (" + 1e-6", ""),
    },
    "cskv.optimal_factors": {
        "svd instead": "return svd_factors(W, rank)",
        "L on the wrong side": ("L.T @ moment", "L @ moment"),
        "in float64": ("V_r.T.contiguous())", "V_r.T.double())"),
    },
    f"{PLAIN}.decode": {
        "old tokens dropped": ("k_hat, self.k[:, :, S:]]", "k_hat * 0, self.k[:, :, S:]]"),
        "key at the next position": ("rope.rotate(k, t)", "rope.rotate(k, t + 1)"),
        "rebuilt keys from position 0": ("rope.rotate(k_hat, first_old)", "rope.rotate(k_hat, 0)"),
        "sinks have latents": ("if t >= self.sinks:", "if True:"),
        "sinks are seen for ever": ("self.k[:, :, first_sink:S]", "self.k[:, :, :S]"),
        "one head only": ("enable_gqa=True", "enable_gqa=False"),
        "rebuilt keys in float32": ("first_old).to(k.dtype)", "first_old)"),
    },
    f"{PLAIN}.branches": {
        "window too long by one": ("self.length - self.window", "self.length - self.window - 1"),
        "sliding window forgotten": ("self.sliding_window or self.length", "self.length"),
    },
    f"{PLAIN}.sinks_and_window": {
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
        "`out` ignored": ("if out is None:", "if True:"),
        "groups of 32": ("grouping.size", "32"),
        "in float16": ("return out", "return out.half()"),
    },
    "quant.fake_quantize": {
        "gradient beyond the levels": ("return ", "return stored + (x - x.detach()); "),
        "in float32": ("grouping).to(x.dtype)", "grouping); x = x.float()"),
        "groups of 32": ("with torch", f"{BY_32}with torch"),
        "clamped forgotten": ("bits, grouping)", "bits, Grouping(grouping.dim, grouping.size))"),
    },
    "quant.pack": {
        "other order of tokens": ("part << (i * width)", "part << (8 - width - i * width)"),
        "in int32": ("(-3, -2)", "(-3, -2).int()"),
    },
    "quant.unpack": {
        "four bits only": "return torch.cat([packed & 15, packed >> 4], -2)",
        "in int32": ("view(torch.uint8).view", "view(torch.uint8).int().view"),
        "one sequence only": ("*packed.shape[:TOKENS]", "packed.shape[0]"),
    },
    "train.layer_loss": {
        "zero": "return ((x @ pair.A) @ pair.B).sum() * 0",
        "clamped forgotten": ("pair.grouping(dim)", "quant.Grouping(dim)"),
        "wrong axis": ("pair.grouping(dim)", "pair.grouping(quant.CHANNELS)"),
        "in float32": ("k_hat = c", "dtype = torch.float32; k_hat = c"),
        "the square taken apart": ("return", "return (k**2 - 2 * k * k_hat + k_hat**2).mean();"),
        "groups of 32": ("pair.grouping(dim)", "quant.Grouping(dim, clamped=pair.clamped)"),
        "always in float64": ("k_hat = c", "dtype = torch.float64; k_hat = c"),
    },
    "train.loss_floor": {
        "one eigenvalue too few": ("- rank]", "- rank - 1]"),
        "mere rounding": ("dropped * (", "dropped + 0 * ("),
    },
    "train.Tuner.step": {
        "gradients pile up": ("self.optimizer.zero_grad(set_to_none=False)", "pass"),
        "steps not counted": ("self.steps_done += 1", "pass"),
        "of one parameter only": ("in self.parameters:", "in self.parameters[:1]:"),
        "gradients are None": ("set_to_none=False", "set_to_none=True"),
    },
    "beyond/segments.damping": {
        "one token too many": "n = length + 1; return (w * n / 2).sin() / (n * (w / 2).sin())",
        "half the turn": "return (w * length / 4).sin() / (length * (w / 4).sin())",
    },
    f"{FAST}.old_scores": {
        "turned the other way": ("turn(q, cos, sin)", "turn(q, cos, -sin)"),
        "keys rebuilt as well": ("u.nar", "(u + 0 * (c.float() @ self.B_k.float()).sum()).nar"),
        "one turn for all": ("turn(q, cos, sin)", "turn(q, cos[:1] + 0 * cos, sin[:1] + 0 * sin)"),
        "heads in another order": ("permute(1, 2, 0, 3)", "permute(1, 2, 0, 3).flip(2)"),
        "bias of keys forgotten": ("self.k_bias is not None", "False"),
        "every part as the first": ("done += m", "pass"),
        "every span at the same place": ("part.start - begin", "0"),
        "q in the type of B": ("to(self.dtype).reshape", "to(torch.float64).reshape"),
    },
    f"{FAST}.old_values": {
        "values rebuilt as well": ("c) + sums", "c + 0 * (c @ self.B_v).sum()) + sums"),
        "bias of values forgotten": ("self.v_bias is not None", "False"),
        "bias of values in full": ("total *", "total / total *"),
        "values from the first token on": ("begin + s, begin + s + m", "s, s + m"),
        "the last chunk only": ("c) + sums", "c)"),
    },
}
