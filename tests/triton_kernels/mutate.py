"""Plants errors in the Triton kernels, one at a time, and shows that the tests catch every one of them.

    python tests/triton_kernels/mutate.py [NAME ...] [--jobs 2]

Each runs the named tests in a copy of the package in which one piece of a kernel was replaced; it is caught if they
fail. Exit status 1, with the survivors' names, if any is not.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import mutations


class Mutation(NamedTuple):
    """In kernels/<file>.py, every occurrence of `old` becomes `new`; tests/triton_kernels/test_op_<file>.py -k `tests`
    must fail (attention's for philox, lora's for quantized)."""

    name: str
    file: str
    old: str
    new: str
    tests: str


RULE = "test_error_rule and float32"
MUTATIONS = [
    Mutation("silu's slope", "activation", "s * (1 + x * (1 - s))", "s * (1 - x * (1 - s))", f"{RULE} and swiglu"),
    Mutation("gelu's density", "activation", "tl.exp(-0.5 * x * x)", "tl.exp(-x * x)", f"{RULE} and geglu"),
    Mutation("a column too many", "activation", "column < columns)", "column <= columns)", f"{RULE} and swiglu"),
    Mutation("a row too many", "activation", "(row < rows) &", "(row <= rows) &", f"{RULE} and gelu_bias"),
    Mutation("swapped strides", "activation", "Matrix(t, t.stride(0))", "Matrix(t, tensors[0].stride(0))",
             "strides_of_their_own"),
    Mutation("one partial sum", "activation", "PARTIAL + first * columns", "PARTIAL", f"{RULE} and gelu_bias"),
    Mutation("no eps", "norm", "/ columns + eps)", "/ columns)", "test_each_term_dominates and float32"),
    Mutation("no mean in the gradient", "norm", "if CENTER:\n            dx -=", "if 0:\n            dx -=", RULE),
    Mutation("no projection in the gradient", "norm", "dx = g - normed *", "dx = g - 0 * normed *", RULE),
    Mutation("no weight offset", "norm", "tl.float32) + weight_offset", "tl.float32)", "test_weight_offset"),
    Mutation("the weight's lines", "norm", "row % bias_lines", "row % weight_lines", "test_weight_per_head and layer"),
    Mutation("a line's rows", "norm", "row = at * lines + line", "row = at + line * line_rows", "test_weight_per_head"),
    Mutation("gradient of the sum", "norm", "dx += tl.load(DSUM", "dx -= tl.load(DSUM", RULE),
    Mutation("unmasked mean", "norm", "h = tl.where(inside, h - mean, 0.0)", "h = h - mean", f"{RULE} and layer"),
    Mutation("dropped rescale", "cross_entropy", "total * tl.exp(m - shift)", "total", "largest_logit_moves"),
    Mutation("smoothing's sign", "cross_entropy", "log_total - below)", "log_total + below)", f"{RULE} and smoothing"),
    Mutation("shifted smoothing", "cross_entropy", "weights * (m - shift)", "0.0", "largest_logit or magnitudes"),
    Mutation("softcap's slope", "cross_entropy", "dx_target, dx) * slope", "dx_target, dx)", f"{RULE} and softcap"),
    Mutation("z-loss's factor", "cross_entropy", "square = 2 *", "square = 1 *", f"{RULE} and z_loss"),
    Mutation("the target's weight", "cross_entropy", "label_smoothing.to(tl.float64)) * target_weight",
             "label_smoothing.to(tl.float64))", f"{RULE} and weight"),
    Mutation("targets unchecked", "cross_entropy", "(target < classes)", "(target <= classes)", "out_of_range"),
    Mutation("a class too many", "cross_entropy", "begin + at < classes", "begin + at <= classes", RULE),
    Mutation("the inverse turn", "rope", "= -sin_b, -sin_a", "= -sin_a, -sin_b", "any_values and float32"),
    Mutation("the position", "rope", "position * angle_seq_stride", "head * angle_seq_stride", RULE),
    Mutation("the partner", "rope", "pair + width // 2", "pair + dim // 2", RULE),
    Mutation("the angle's sign", "rope", "a * cos_a - b * sin_a", "a * cos_a + b * sin_a", RULE),
    Mutation("no rest", "rope", "rest < dim", "rest < dim - 1", RULE),
    Mutation("causal off by one", "attention", "offset <= p.right", "offset < p.right", f"{RULE} and causal"),
    Mutation("window off by one", "attention", "offset >= -p.left", "offset > -p.left", f"{RULE} and window"),
    Mutation("top-left alignment", "attention", "j - (i + (keys - queries))", "j - i", f"{RULE} and causal-fewer"),
    Mutation("first key of the window", "attention", "first + shift - before", "first + shift - before + 16",
             f"{RULE} and window"),
    Mutation("last key", "attention", "first + BLOCK + shift + after", "first + BLOCK + after",
             f"{RULE} and causal-fewer"),
    Mutation("the bias's head", "attention", "bias_head + member % head_members", "bias_head", f"{RULE} and bias"),
    Mutation("the bias's batch", "attention", "bias_batch + member // head_members", "bias_batch", f"{RULE} and bias"),
    Mutation("no delta in the bias", "attention", "acc += prob * (dp - delta)", "acc += prob * dp", f"{RULE} and bias"),
    Mutation("a split of the bias lost", "attention", "return dbias.sum(0)", "return dbias[0]", f"{RULE} and bias"),
    Mutation("accumulator not rescaled", "attention", "acc * rescale", "acc", f"{RULE} and scale-sharp"),
    Mutation("sink not rescaled", "attention", "acc *= rescale", "acc *= 1.0", f"{RULE} and sinks"),
    Mutation("no scale in dq", "attention", "acc * p.scale", "acc", f"{RULE} and plain"),
    Mutation("no scale in dk", "attention", "dk * p.scale", "dk", f"{RULE} and plain"),
    Mutation("no delta in dk", "attention", "prob * (dp - delta) * slope).to(q", "prob * dp * slope).to(q",
             f"{RULE} and plain"),
    Mutation("no slope of softcap", "attention", "(dp - delta) * slope).to(k.dtype)", "(dp - delta)).to(k.dtype)",
             f"{RULE} and softcap"),
    Mutation("the group's head", "attention", "kv_head * p.group + member", "kv_head + member", f"{RULE} and grouped"),
    Mutation("the key's head", "attention", "head // p.group", "head % p.group", f"{RULE} and grouped"),
    Mutation("key mask ignored", "attention", "if p.mask is not None:\n        found", "if 0:\n        found",
             f"{RULE} and padding"),
    Mutation("gradient of lse", "attention", "delta -= tl.load(DLSE", "delta += tl.load(DLSE", f"{RULE} and lse"),
    Mutation("dropout not scaled", "attention", "keep, prob * p.dropout_scale, 0.0)\n        dp",
             "keep, prob, 0.0)\n        dp", f"{RULE} and dropout"),
    Mutation("sequence found too late", "attention", "+ middle <= tile", "+ middle < tile", "varlen_error_rule"),
    Mutation("the keys' begin", "attention", "load_rows(p.v, batch, head // p.group, k_begin",
             "load_rows(p.v, batch, head // p.group, 0", "varlen_error_rule"),
    Mutation("the words of Philox", "philox", "word == 2, w2, w3", "word == 2, w3, w2", f"{RULE} and dropout"),
    Mutation("no scaling", "lora", "product *= scale", "product *= 1.0", "test_linear and float32-plain"),
    Mutation("no 1 / (1 - p)", "lora", "scale * (1 if drop_a else kept_scale)", "scale", "test_linear_dropout"),
    Mutation("dropout's index", "lora", "(1, x.shape[1])", "(x.shape[1], 1)", "test_linear_dropout"),
    Mutation("one seed for all projections", "lora", "tile_n * seed_stride", "0", "test_linears"),
    Mutation("a part of the sum lost", "lora", "(split + 1) * k_per_split", "k_per_split", "linear_shapes and 300"),
    Mutation("the sum over projections", "lora", "add=dx, adapter", "add=None, adapter", "test_linears"),
    Mutation("rank cut off", "lora", "range(0, rank, BLOCK_R)", "range(0, BLOCK_R, BLOCK_R)", "rank_70"),
    Mutation("gradient of lora_B", "lora", "(dB[i], scaling", "(dB[i], 1.0", "test_linear and float32-plain"),
    Mutation("gradient of lora_A", "lora", "(dA[i].T, scaling", "(dA[i].T, 1.0", "test_linear and float32-plain"),
    Mutation("strips of the gradient", "lora", "(strip * columns + down)", "down", "linear_shapes and 300"),
    Mutation("splits of dy lora_B", "lora", "(split + 1) * columns_per_split", "columns_per_split",
             "linear_shapes and 300"),
    Mutation("dropped elements", "dropout", "x * scale, 0.0", "x * scale, x", "test_mask_is_philox"),
    Mutation("dropout unscaled", "dropout", "x * scale", "x", "test_error_rule"),
    Mutation("the nibbles", "quantized", "byte >> 4, byte & 15", "byte & 15, byte >> 4", "test_quantized and nf4"),
    Mutation("the tile's scale", "quantized", "row // block_rows *", "row *", "test_quantized and fp8_tiles"),
    Mutation("limit too early", "linear_cross_entropy", "(counted - begin)", "(counted - begin - 64)", RULE),
    Mutation("ignored rows multiplied", "linear_cross_entropy", "torch.where(ignored[at, None], 0, input[at])",
             "input[at]", "ignored_rows"),
    Mutation("the bias unscaled", "linear_cross_entropy", "linear_bias.float() * logit_scale", "linear_bias.float()",
             f"{RULE} and all"),
    Mutation("another tile's maximum", "linear_cross_entropy", "(column // tile_columns)", "(0 * column)", RULE),
    Mutation("the target's logit", "linear_cross_entropy", "column == target, logits, 0", "column == row, logits, 0",
             RULE),
    Mutation("no target in the gradient", "linear_cross_entropy",
             "tl.where(column == target, tl.load(D_TARGET + row), d)", "d", RULE),
    Mutation("smoothing of another tile", "linear_cross_entropy", "(self.tile_maximum - shift))", "0)",
             f"{RULE} and all"),
    Mutation("softcap's slope in the head", "linear_cross_entropy", "(1 + logits / softcap)", "(1 - logits / softcap)",
             f"{RULE} and all"),
    Mutation("softcap's slope at the target", "linear_cross_entropy", "if self.softcap is not None:\n            d",
             "if 0:\n            d", f"{RULE} and all"),
    Mutation("softcap's slope under smoothing", "linear_cross_entropy", "if SLOPE is not None", "if 0",
             "test_magnitudes"),
    Mutation("a class too many in the head", "linear_cross_entropy", "    inside = column < classes\n\n",
             "    inside = column <= classes\n\n", RULE),
    Mutation("the head's strides", "linear_cross_entropy", "lora_stride_r, lora_stride_n, X.",
             "lora_stride_n, lora_stride_r, X.", f"{RULE} and all"),
]  # fmt: skip


def caught(mutation: Mutation) -> bool:
    op = {"philox": "attention", "quantized": "lora"}.get(mutation.file, mutation.file)
    with mutations.planted(mutation, f"kernels/{mutation.file}.py") as copy:
        return mutations.fails(copy, mutation, f"tests/triton_kernels/test_op_{op}.py")


if __name__ == "__main__":
    sys.exit(mutations.main(__doc__, MUTATIONS, caught))
