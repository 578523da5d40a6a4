"""Plants errors in the CUDA kernels, one at a time, and shows that the tests catch every one of them.

    python tests/cuda/mutate.py [NAME ...] [--jobs 2]

Each compiles one kernel file with one piece replaced, links it with the other objects of the last `make build` into an
emulator of its own, and runs the named tests in a copy of the package; it is caught if they fail. Exit status 1, with
the survivors' names, if any is not.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import TORCH_LIB_PATH

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tests")]
import mutations  # noqa: E402
import toolchain  # noqa: E402


class Mutation(NamedTuple):
    """In csrc/cuda/<file>, which `old` names once, it becomes `new`; csrc/cuda/<kernel>.cu is compiled with it, and
    tests/cuda/test_op_<the kernel's op>.py -k `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    kernel: str
    tests: str


def planted_in(file: str, kernel: str, tests: str, rows: list[tuple[str, ...]]) -> list[Mutation]:
    """Of rows (name, old, new) and, where others than `tests` must fail, these."""
    return [Mutation(name, file, old, new, kernel, *(other or [tests])) for name, old, new, *other in rows]


LOSS, LOSS_FILE = "cross_entropy", "cross_entropy.cuh"
HEADS, TILES = "attention.cuh", "tile.cuh"
BF16, FP32 = "attention_bf16", "attention_fp32"
HEADS90, BACK90, BF16_90 = "attention90.cuh", "attention90_backward.cuh", "attention90_bf16"
GEMM, GEMM90 = "gemm.cuh", "gemm90.cuh"
HEAD, HEAD_ROWS = "linear_cross_entropy.cuh", "linear_cross_entropy.cu"
HEAD_ALL, HEAD_BF16, HEAD_FP32 = (f"linear_cross_entropy{suffix}" for suffix in ("", "_bf16", "_fp32"))
LORA, LORA16, LORA32 = "lora.cuh", "lora_bf16", "lora_fp32"
LORA90, LORA90_16, ON90 = "lora90.cuh", "lora90_bf16", "sm_90a and whole_vectors and bfloat16"
RING = "ring90.cuh"
RULE = "test_error_rule"
MUTATIONS = [
    *planted_in(LOSS_FILE, LOSS, RULE, [
        ("dropped rescale", "sum *= exp(max - shift);", "", "largest_logit_moves"),
        ("smoothing not rescaled", "if (weights != 0.f) below += weights * (max - shift);", "",
         f"{RULE} and smoothing"),
        ("no barrier before the warps join", "__syncthreads();\n  state = lane < warps", "state = lane < warps"),
        ("no barrier before the gradient", "{\n    __syncthreads();\n    const RowGradient",
         "{\n    const RowGradient"),
        ("no cluster barrier before the sums are read", "cluster_barrier();\n    state = Softmax::none();",
         "state = Softmax::none();", "long_rows"),
        ("a block leaves while its sums are read", "cluster_barrier();  // no", "// no", "blocks_of_a_cluster"),
        ("elements before the row", "begin + i >= 0 && begin + i < classes ? x", "begin + i < classes ? x",
         "begin_anywhere"),
        ("elements after the row", "begin + i >= 0 && begin + i < classes ? x", "begin + i >= 0 ? x", "begin_anywhere"),
        ("vectors where they are not aligned", "if (aligned_alike && x.whole(first))", "if (x.whole(first))",
         "begin_anywhere"),
        ("no target in the gradient", "if (at == target) d[i] = g.target;", ""),
        ("the softcap's slope", "slope = (1.f - t) * (1.f + t);", "", f"{RULE} and softcap"),
        ("ignored rows keep what was there", "c += threads) store(c, zeros);", "c += threads) {}"),
        ("a bad target passes", "+ 0.0 * x_target", "", "out_of_range"),
    ]),
    *planted_in(TILES, BF16, f"{RULE} and bfloat16", [
        ("a's matrices", "k / 8 + lane / 16", "k / 8 + lane / 8 % 2"),
        ("b's matrices", "k + matrix % 2 * 8 + within, column / 8 + matrix / 2",
         "k + matrix / 2 * 8 + within, column / 8 + matrix % 2"),
        ("the swizzle", "(r, b.chunk(column + matrix / 2 * 8 + within, k / 8 + matrix % 2))",
         "(r, b.data + (column + matrix / 2 * 8 + within) * b.kStride + k + matrix % 2 * 8)"),
        ("columns beyond the head's width", "dim - column < kChunk ? dim - column : kChunk", "kChunk"),
        ("asynchronous copies of what is not aligned", "if (aligned) {", "if (true) {", f"{RULE} and odd and bfloat16"),
        ("a copy not waited for", "wait_copies<1>", "wait_copies<2>"),
        ("no barrier before the work", "__syncthreads();\n    work(", "work("),
        ("no barrier after the work", "__syncthreads();  // all are done", "// all are done"),
        ("the wrong stage", "load(at + kInner, stage ^ 1)", "load(at + kInner, stage)"),
    ]),
    *planted_in(TILES, FP32, f"{RULE} and float32", [
        ("no barrier before scratch is written", "__syncwarp();  // the last", "// the last"),
        ("no barrier before scratch is read", "__syncwarp();\n    multiply<", "multiply<"),
    ]),
    *planted_in(HEADS, BF16, f"{RULE} and bfloat16", [
        ("the sums not rescaled", "acc[j][2 * h] *= rescale, acc[j][2 * h + 1] *= rescale;", "{}"),
        ("the denominator not rescaled", "total[h] *= rescale;", ""),
        ("the maximum of half a row", "largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 2));", ""),
        ("the denominator of half a row", "total[h] += __shfl_xor_sync(~0u, total[h], 2);", ""),
        ("causal too early", "offset <= a.right);", "offset < a.right);", f"{RULE} and causal"),
        ("a window that begins too late", "a.left >= 0 && left > 0 ? left : 0",
         "a.left >= 0 && left > 0 ? left + 1 : 0", f"{RULE} and window"),
        ("a tile taken for visible", "i1 <= queries && j1 <= keys", "i1 <= queries", f"{RULE} and bfloat16 and whole"),
        ("queries too few for a window's keys", "p.first + rows + queries - p.length + a.left",
         "p.first + queries - p.length + a.left", f"{RULE} and window"),
        ("dropout's index", "return (row + i) * a.dropout_keys + j;", "return row * a.dropout_keys + i + j;",
         f"{RULE} and dropout"),
        ("no 1 / (1 - p)", "float(1.0 / (1.0 - a.dropout_p))", "1.f", f"{RULE} and dropout"),
        ("the sign of lse's gradient", "sum -= a.dlse", "sum += a.dlse", f"{RULE} and lse"),
        ("one query head of a group", "head < (p.head + 1) * group", "head < p.head * group + 1",
         f"{RULE} and grouped"),
        ("dk without the scale", "scale[2] = {a.scale, a.scale}", "scale[2] = {1.f, 1.f}"),
        ("tiles of packed sequences", "(cu_at(cu, wide, n) / tile_rows + n)) * tile_rows",
         "(cu_at(cu, wide, n) / tile_rows)) * tile_rows", "varlen_error_rule"),
        ("masked keys", "(!kGeneral || !mask || mask[j])", "true", f"{RULE} and padding"),
        ("the scores' slope", "slope = (1.f - t) * (1.f + t);", "", f"{RULE} and softcap"),
        ("no sink in the denominator", "total[h] * rescale + exponential<T>(sink - base)", "total[h] * rescale",
         f"{RULE} and sinks"),
        ("half of a wide head", "warp / (Tiles::kOuter / 16) * kColumns", "0", f"{RULE} and wide"),
    ]),
    *planted_in("attention.cu", "attention", f"{RULE} and sinks", [
        ("the sign of a sink's gradient", "sum -= exp(", "sum += exp("),
        ("terms of a bias's gradient", "left /= full[i];", "left /= full[i] + 1;", f"{RULE} and bias"),
    ]),
    *planted_in(HEADS90, BF16_90, "several_tiles and bfloat16", [
        ("keys not waited for", "ring[0].wait(n);", ""),
        ("values not waited for", "ring[1].wait(n - 1);", ""),
        ("the last values not waited for", "ring[1].wait(tiles - 1);", "", f"{RULE} and bfloat16"),
        ("keys given back while they are read",
         "wgmma_wait<1>();\n      hold(s_registers);\n      ring[0].release(n);",
         "ring[0].release(n);\n      wgmma_wait<1>();"),
        ("values given back while they are read",
         "wgmma_wait<0>();\n      hold(acc_registers);\n      ring[1].release(n - 1);",
         "ring[1].release(n - 1);\n      wgmma_wait<0>();"),
        ("scores of the next tile not waited for", "wgmma_wait<1>", "wgmma_wait<2>"),
        ("probabilities overwritten while they are read", "wgmma_wait<0>();\n      hold(acc",
         "wgmma_wait<1>();\n      hold(acc"),
        ("the bytes of a tile", "fill(n, A::kTileBytes)", "fill(n, A::kKeyHalf)"),
        ("nobody's turn", "named_barrier_arrive(A::kTurns +", "named_barrier_arrive(9 +"),
        ("sums of values not rescaled", "acc[j][e] *= rescale[e / 2];", "{}"),
        ("the denominator not rescaled on sm_90a", "total[h] *= rescale[h];", ""),
        ("the maximum of half a row on sm_90a", "largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));", "",
         f"{RULE} and bfloat16"),
        ("the maximum without the scale", "maximum[h] *= a.scale;", "{}", f"{RULE} and bfloat16"),
        ("half of the keys' columns", "k + d / 4 * A::kKeyHalf", "k"),
        ("half of the values' columns", "wgmma_descriptor(v + k * 16 * 128, A::kKeyHalf)",
         "wgmma_descriptor(v + k * 16 * 128)"),
        ("one warp group's queries", "shared + group * 64 * 128", "shared", f"{RULE} and bfloat16"),
        ("an operand's rows and columns", "s[2 * k + i / 2][i % 2 * 2]", "s[2 * k + i % 2][i / 2 * 2]",
         f"{RULE} and bfloat16"),
        ("the next sequence's values", "a.cu_k && left < A::kKeys", "false && left",
         "neighbours or rows_of_no_sequence"),
        ("no barrier after the zeros", "named_barrier(A::kZeros, A::kConsumers);", "",
         "neighbours or rows_of_no_sequence"),
        ("zeros that no fence made visible", "fence_async();", "", "neighbours or rows_of_no_sequence"),
        ("scores begun without a fence", "hold(s_registers);\n    wgmma_fence();", "", f"{RULE} and bfloat16"),
        ("more registers than the block has", "kGroups == 2 ? 240", "kGroups == 2 ? 248"),
        ("barriers that TMA may not see", "fence_mbarrier_init();", "", f"{RULE} and bfloat16"),
        ("a tile that nobody waits for", "if (n + 1 < tiles) load", "load", f"{RULE} and bfloat16"),
        ("a tile on the border taken for visible", "first + 64, at, at + A::kKeys", "first + 64, at, at + 64",
         f"{RULE} and bfloat16"),
        ("a lane's columns", "at + lane % 4 * 2 - seen.first", "at + lane % 4 - seen.first",
         f"{RULE} and bfloat16 and causal"),
        ("a query head's keys on sm_90a", "p.head / int(a.heads / a.kv_heads)", "p.head % int(a.kv_heads)",
         f"{RULE} and bfloat16 and grouped"),
    ]),
    *planted_in(BACK90, BF16_90, "several_tiles and bfloat16", [
        ("a pair of tiles not waited for", "ring().wait(n);", ""),
        ("a block's rows not waited for", "mbarrier_wait(block.rows_there(), 0);", "{}"),
        ("tiles of dq given back while they are read", "if (n > 0) block.ring().release(n - 1);",
         "block.ring().release(n);"),
        ("tiles of dk given back while they are read",
         "wgmma_wait<0>();\n      hold(dv_sums);\n      hold(dk_sums);\n      block.ring().release(n);",
         "block.ring().release(n);\n      wgmma_wait<0>();"),
        ("scores of dq not waited for", "wgmma_wait<1>();\n    hold(s);", "wgmma_wait<2>();\n    hold(s);"),
        ("gradients of dk's probabilities not waited for", "wgmma_wait<1>();\n      hold(dp);",
         "wgmma_wait<2>();\n      hold(dp);"),
        ("the next sequence's rows in the backward", "if (!packed || count >= kInner) return;", "return;",
         "neighbours or rows_of_no_sequence"),
        ("no barrier after the backward's zeros", "named_barrier(1, kConsumers);", "",
         "neighbours or rows_of_no_sequence"),
        ("the backward's zeros that no fence made visible", "fence_async();", "", "neighbours or rows_of_no_sequence"),
        ("half of a product's depth", "b + d / 4 * kInnerHalf", "b"),
        ("half of the gradients' columns", "wgmma_descriptor(b + k * 16 * 128, kInnerHalf)",
         "wgmma_descriptor(b + k * 16 * 128)"),
        ("one warp group's rows in the backward", "outer(which) + threadIdx.x / 128 * 64 * 128", "outer(which)",
         f"{RULE} and bfloat16"),
        ("dq without the scale on sm_90a", "factor[2] = {a.scale, a.scale}", "factor[2] = {1.f, 1.f}",
         f"{RULE} and bfloat16"),
        ("dk without the scale on sm_90a", "scale[2] = {a.scale, a.scale}", "scale[2] = {1.f, 1.f}",
         f"{RULE} and bfloat16"),
        ("one query head of a group on sm_90a", "head < group", "head < 1", f"{RULE} and bfloat16 and grouped"),
        ("keys that a query does not see, in dq", "B::mask(probability, at, seen);", "{}",
         f"{RULE} and bfloat16 and causal"),
        ("no delta in dk", "dp[4 * j + h + e] - delta", "dp[4 * j + h + e]", f"{RULE} and bfloat16"),
        ("probabilities not normalised", "(maximum + a.log_sum[row])", "maximum", f"{RULE} and bfloat16"),
    ]),
    *planted_in(HEADS, BF16_90, f"{RULE} and bfloat16 and causal", [
        ("a row's keys end too late", "behind = position + a.right + 1", "behind = position + a.right + 2"),
        ("a row's keys begin too late", "position - a.left, end", "position - a.left + 1, end",
         f"{RULE} and bfloat16 and window"),
        ("a key's queries begin too late", "position - a.right, end", "position - a.right + 1, end"),
        ("a key's queries end too early", "behind = position + a.left + 1", "behind = position + a.left",
         f"{RULE} and bfloat16 and window"),
    ]),
    *planted_in(GEMM, HEAD_BF16, "several_tiles and bfloat16", [
        ("a product's copy not waited for", "wait_copies<kStages - 2>", "wait_copies<kStages - 1>"),
        ("no barrier before a step", "__syncthreads();  // this step's", "// this step's"),
        ("a step into the wrong stage", "(stage + kStages - 1) % kStages);", "stage);"),
        ("rows not gathered", "count && from.index ?", "false ?", f"{RULE} and bfloat16"),
        ("columns beyond the rank", "left < kChunk ? left : kChunk", "kChunk", f"{RULE} and bfloat16 and lora"),
        ("copies of 16 bytes from anywhere", "reinterpret_cast<uintptr_t>(data) % 16 == 0", "true", "within_another"),
        ("rows of 16 bytes from anywhere", "row_stride * int64_t(sizeof(T)) % 16 == 0", "true",
         "any_strides and bfloat16"),
        ("rows that do not count", "(kADeep ? depth : m) = p.here(kADeep ? depth : m);", "", f"{RULE} and bfloat16"),
        ("where the second term begins", "step - first_steps : step", "step : step", f"{RULE} and bfloat16 and lora"),
        ("a split's steps", "begin + each < steps ? begin + each : steps", "steps",
         "several_tiles and bfloat16 and lora"),
        ("a column too many", "pairs && c + 1 < gemm.n", "pairs", "test_shapes or any_strides"),
        ("rows of dx where they were gathered", "out.index ? out.index[r] : r", "r", f"{RULE} and bfloat16"),
    ]),
    *planted_in(TILES, HEAD_BF16, f"{RULE} and bfloat16", [
        ("a's transposed matrices", "k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2",
         "k + lane / 8 % 2 * 8 + lane % 8, row / 8 + lane / 16"),
    ]),
    *planted_in(GEMM, HEAD_FP32, f"{RULE} and float32", [
        ("fp32 operands", "kADeep ? a.at(k, r) : a.at(r, k)", "a.at(r, k)"),
    ]),
    *planted_in(HEAD, HEAD_BF16, f"{RULE} and bfloat16", [
        ("classes that are not there", "if (!inside) x = -INFINITY;", ""),
        ("the maximum of half a tile", "largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));", ""),
        ("the sum of half a tile", "by = 1; by <= 2", "by = 1; by <= 1"),
        ("the logits' scale", "(x + bias) * a.logit_scale", "x * a.logit_scale + bias"),
        ("a tile's exponentials not rescaled", "if (!capped) factor *=", "if (false) factor *="),
        ("no target in the logits' gradient", "if (first + i == target) d[i] = g.target;", ""),
        ("the head's softcap's slope", "slope = (1.f - t) * (1.f + t);", "", f"{RULE} and bfloat16 and softcap"),
        ("smoothing in the logits' gradient", "g.soft * a.class_weight[first + i] : g.soft", "0.f : 0.f",
         f"{RULE} and bfloat16 and smoothing"),
        ("a chunk's gradients in place of the sum", "later = l.begin > 0", "later = false", "many_chunks and bfloat16"),
        ("a chunk's bias gradient in place of the sum", "l.begin ? l.a.dbias[c] : 0.f", "0.f",
         "many_chunks and bfloat16"),
        ("no barrier before the bias's sums", "sum[i];\n  __syncthreads();", "sum[i];",
         f"{RULE} and bfloat16 and bias"),
        ("one part of a narrow product", "s < l.splits", "s < 1", "several_tiles and bfloat16 and lora"),
        ("the adapter's scaling", "join(p, a.scaling,", "join(p, 1.f,", f"{RULE} and bfloat16 and lora"),
        ("dx's parts in one place", "chunk * columns, true", "0, true", "several_tiles and bfloat16 and plain"),
        ("dx's rows where they are not", "j.to.index ? j.to.index[r] : r", "r", "hopper and split"),
        ("a part of dx left out", "l.splits = p.splits", "l.splits = p.splits - 1",
         "several_tiles and bfloat16 and plain"),
    ]),
    *planted_in(HEAD_ROWS, HEAD_ALL, RULE, [
        ("a warp's rows twice", "if (w < warp) before", "if (w <= warp) before"),
        ("counts overwritten before they are read", "__syncthreads();  // all have read", "// all",
         "frozen_head and plain or frozen_head and sum"),
        ("tiles not rescaled", "s.sum * expf(s.max - shift)", "s.sum"),
        ("a tile's smoothing not rescaled", "if (w.weights != 0.f) below +=", "if (false) below +=",
         f"{RULE} and smoothing"),
        ("half of a row's tiles", "x = add(x, __shfl_xor_sync(~0u, x, 16));", ""),
        ("joined before all have read", "__syncthreads();  // what was", "// what was"),
        ("a bad target of the head passes", " + 0.0 * z_target", "", "out_of_range"),
        ("p at the target", "hard * (p - 1.0)", "hard * p"),
    ]),
    *planted_in(LORA, LORA16, "rank_70", [
        ("h without its scale", "l.granules[g].scale * a.h[", "a.h[", "linear and adapter_dominates"),
        ("h's columns of another adapter", "+ l.granules[g].column + k];", "+ k];", "test_linears"),
        ("no column of ones", "if (j == l.ones)", "if (false)", "bias_dominates"),
        ("rows of the last strip", "(rows + 31) / 32 * 32", "rows / 32 * 32", "linear_shapes"),
        ("every strip's gradient in one place", "a.outer + ((strip * a.granule_count", "a.outer + ((0",
         "several_passes"),
        ("every part's sum in one place", "a.down[(part * a.rows +", "a.down[(", "linear_shapes"),
        ("the next pass overwrites", "l.a.accumulate = true;", ""),
        ("the first pass's granules again", "a.granules[l.first + g]", "a.granules[g]"),
        ("the panel of the first pass again", "a.panel) + l.first * kLoraGranule * a.ld", "a.panel)"),
        ("what a granule does not hold is stored", "k < l.granules[g].count)\n", "true)\n", "test_linears"),
        ("one granule's sums for all", "panel(stage), g * kLoraGranule, k)", "panel(stage), 0, k)",
         "linear and rank_17"),
        ("masks used before they are drawn", "draw(at);\n      __syncthreads();", "draw(at);", "dropout"),
        ("no barrier before what is left is multiplied", "drop(g, stage);\n          __syncthreads();",
         "drop(g, stage);", "dropout or linears"),
        ("no barrier before the next adapter's", "__syncthreads();  // all are done with it", "// all are done",
         "linears or several_passes"),
        ("the first adapter's mask for all", "mask(adapter)[i * 8 + j]", "mask(0)[i * 8 + j]",
         "linears or several_passes"),
        ("words of a row that begins within four", "return bits >> (e % 4) & 0xFF;", "return bits & 0xFF;",
         "dropout_shapes"),
        ("words that a chunk reaches into", "e % 4 ? 3 : 2;", "2;", "dropout_shapes"),
        ("dropout's row", "uint64_t(first_row + i / 8)", "uint64_t(i / 8)", "several_passes"),
        ("half of the kept elements", "bits >> (2 * i + 1) & 1", "bits >> (2 * i) & 1", "dropout"),
    ]),
    *planted_in(LORA, LORA32, "dropout", [
        ("fp32: the second half of eight", "bits >> (4 * vector + i) & 1", "bits >> i & 1"),
    ]),
    *planted_in(TILES, LORA16, "linear_shapes", [
        ("the lower half of a transposed block", "load_rows<true>(block[half], a, row, k + 16 * half)",
         "load_rows<true>(block[half], a, row, k)"),
        ("the upper 16 of a transposed depth", "mma<T>(acc[j], block[1], second);", ""),
    ]),
    *planted_in("lora.cu", "lora", "linear_shapes", [
        ("the last parts of a sum", "for (; p < a.count; ++p) sums[0]", "for (; p < 0; ++p) sums[0]"),
        ("a panel's rows beyond the matrix", "row >= from.at + from.rows ||", ""),
        ("silu's slope", "plus + x * plus * minus};\n    }\n    case gelu:", "plus + x * plus};\n    }\n    case gelu:",
         "test_mlp"),
        ("up's gradient", "from_float<T>(d * f.value)", "from_float<T>(d * f.slope)", "test_mlp"),
        ("an operand without its scale", "g.scale * l.a.h", "l.a.h", ON90),
        ("an operand's columns that are not there", "k < g.count ? g.scale", "true ? g.scale",
         "sm_90a and do_not_meet"),
        ("TMA from anywhere", "reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld", "ld", "sm_90a and only_look"),
        ("TMA of rows of any length", "ld % 8 == 0 &&", "", "sm_90a and linear_shapes"),
    ]),
    *planted_in("quantized.cu", "quantized", "few_rows", [
        ("the second of a pair first", "i % 2 ? codes[i / 2] & 15", "i % 2 == 0 ? codes[i / 2] & 15", "test_quantized"),
        ("the next row's scales", "border = 0, ++row;", "border = 0;", "begin_anywhere"),
        ("operands of a product in another order", "{w[0][k], w[1][k], w[0][k + 1], w[1][k + 1]}",
         "{w[0][k], w[0][k + 1], w[1][k], w[1][k + 1]}"),
        ("no barrier before the warps' parts are added", "__syncthreads();\n  for (int i = threadIdx",
         "for (int i = threadIdx"),
        ("a row of x too few", "if (row < a.rows && left > 0)", "if (row + 1 < a.rows && left > 0)"),
        ("the low-rank terms forgotten", "if (a.add) sum +=", "if (false) sum +="),
        ("columns that a warp does not reach", "at += kQuantizedWarps * kStep", "at += a.columns"),
        ("a block of scales for all", "at % a.k / a.block_columns];", "0];"),
        ("a block that ends with its row", "if (border > k) border = k;", "", "begin_anywhere"),
    ]),
    *planted_in(GEMM90, HEAD_BF16, "hopper", [
        ("a stage freed too soon", "release(step - 1)", "release(step)"),
        ("a stage freed by half of the warps", "kConsumers / 32);", "kConsumers / 64);"),
        ("two products in flight", "wgmma_wait<1>();", "wgmma_wait<2>();"),
        ("the last product not waited for", "wgmma_wait<0>();", ""),
        ("16 depths further", "b + k * 16 * 128", "b + k * 32"),
        ("the next 64 columns", "k * 16 * 128, kBBytes / 2)", "k * 16 * 128)"),
        ("columns copied twice", "int(column) + 64, at", "int(column), at"),
        ("a warp group's rows", "warp_row / 128 * 128 * 128", "0"),
        ("the adapter's boxes", "&boxes.a[second]", "&boxes.a[0]"),
        ("every part from the first step", "begin = split * each,", "begin = 0,", "hopper and split"),
        ("the adapter in every part", "begin + step >= first_steps", "step + 3 >= steps", "hopper and split"),
    ]),
    *planted_in(RING, LORA90_16, ON90, [
        ("a stage freed for its own block alone", "if (lane < kBlocks)", "if (lane < 1)"),
        ("a stage freed by one block's warps", "kBlocks * warps", "warps"),
    ]),
    *(mutation for kernel, tests in ((BF16_90, "several_tiles and bfloat16"), (HEAD_BF16, "hopper"), (LORA90_16, ON90))
      for mutation in planted_in(RING, kernel, tests, [
        (f"a tile not waited for by {kernel}", "mbarrier_wait(full(n), n / kStages % 2);", ""),
        (f"a stage filled while {kernel} reads it", "if (n >= kStages) mbarrier_wait(", "if (false) mbarrier_wait("),
        (f"the phase in which {kernel} frees a stage", "n / kStages % 2 ^ 1", "n / kStages % 2"),
        (f"a stage freed by a first lane of {kernel}", "__syncwarp();", ""),
    ])),
    *planted_in(LORA90, LORA90_16, ON90, [
        ("a ring that begins anew with each tile", "multiply<true>(l.terms[i].depth, step, sums)",
         "multiply<true>(l.terms[i].depth, step = 0, sums)"),
        ("a ring's stage freed too soon", "if (read < step) ring().release", "if (read <= step) ring().release"),
        ("a term's products still in flight", "wgmma_wait<0>();", ""),
        ("a step's products still in flight", "wgmma_wait<1>();", "wgmma_wait<2>();"),
        ("the next 64 columns of a deep tile", "wgmma_descriptor(b + k * 16 * 128, kBoxBytes)",
         "wgmma_descriptor(b + k * 16 * 128)"),
        ("16 depths further in a deep tile", "b + k * 16 * 128", "b + k * 32"),
        ("the other block's half of b", "at, column + rank * (kColumns / 2)", "at, column"),
        ("the other block's half of a deep b", "column + box * 64, at}", "column + box % 2 * 64, at}"),
        ("another warp group's rows", "group() * 64 * 128;", "0;"),
        ("the last depths of a term", "(depth % kDepth + 15) / 16", "depth % kDepth / 16"),
        ("no bias in a product", "if (result.bias) {", "if (false) {"),
        ("a bias for half of the rows", ", sums[4 * j + e + 2] += x;", ";"),
        ("a bias of fp32 read as 16-bit", "result.bias_wide ?", "false ?"),
        ("a result overwritten before it has left", "if (leads()) wait_stores<0>();\n      named", "named"),
        ("no barrier before a result is written", "named_barrier(1 + group(), 128);  // what was", "// what was"),
        ("a result that no fence made visible", "fence_async();", ""),
        ("no barrier before a result leaves", "fence_async();\n      named_barrier(1 + group(), 128);",
         "fence_async();"),
        ("a block ends before its results have left", "if (leads()) wait_stores<0>();\n  }", "}"),
        ("a result's swizzle", "(j % 8 ^ r % 8) * 16", "j % 8 * 16"),
        ("the first group's rows again", "(first + in_group % rows)", "(in_group % rows)"),
        ("every result's first columns", "column -= this->columns(result)", "column = 0"),
        ("a block leaves while the other writes to it", "cluster_barrier();  // no block", "// no block"),
        ("a cluster that is not there yet", "block.begin();\n  cluster_barrier();",
         "block.begin();\n  __syncthreads();"),
    ]),
]  # fmt: skip


def caught(mutation: Mutation) -> bool:
    with mutations.planted(mutation, f"csrc/cuda/{mutation.file}") as copy:
        built = ROOT / toolchain.FOLDER
        replaced = built / f"csrc_cuda_{mutation.kernel}.cu.emulator.o"
        objects = [o for o in sorted(built.glob("*.emulator.o")) if o != replaced]
        # within the copy, so that ccache knows the same text again wherever the copy lies
        flags = [*toolchain.COMMON.replace("-O3", "-O1").split(), "-DPYFAST_EMULATOR", "-w", "-x", "c++"]
        kernel = Path("csrc", "cuda", f"{mutation.kernel}.cu")
        subprocess.run([toolchain.CXX, *flags, "-c", kernel, "-o", "kernel.o"], cwd=copy, check=True)
        library = [f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10", "-lpthread"]
        target = copy / "pyfast" / next((ROOT / "pyfast").glob("_emu.*so")).name
        subprocess.run([toolchain.CXX, "-shared", copy / "kernel.o", *objects, *library, "-o", target], check=True)
        op = re.sub("_(fp32|bf16|fp16)$", "", mutation.kernel)
        files = [f"tests/cuda/test_op_{name}.py" for name in (op, op.removesuffix("90"))]
        return mutations.fails(copy, mutation, next(file for file in files if (ROOT / file).exists()))


if __name__ == "__main__":
    sys.exit(mutations.main(__doc__, MUTATIONS, caught))
