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


LOSS, LOSS_FILE = "cross_entropy", "cross_entropy.cuh"
HEADS, TILES = "attention.cuh", "tile.cuh"
BF16, FP32 = "attention_bf16", "attention_fp32"
GEMM, GEMM90 = "gemm.cuh", "gemm90.cuh"
HEAD, HEAD_ROWS = "linear_cross_entropy.cuh", "linear_cross_entropy.cu"
HEAD_ALL, HEAD_BF16, HEAD_FP32 = (f"linear_cross_entropy{suffix}" for suffix in ("", "_bf16", "_fp32"))
LORA, LORA16, LORA32 = "lora.cuh", "lora_bf16", "lora_fp32"
LORA90, LORA90_16, ON90 = "lora90.cuh", "lora90_bf16", "sm_90a and whole_vectors and bfloat16"
RULE = "test_error_rule"
MUTATIONS = [
    Mutation("dropped rescale", LOSS_FILE, "sum *= exp(max - shift);", "", LOSS, "largest_logit_moves"),
    Mutation("smoothing not rescaled", LOSS_FILE, "if (weights != 0.f) below += weights * (max - shift);", "", LOSS,
             f"{RULE} and smoothing"),
    Mutation("no barrier before the warps join", LOSS_FILE, "__syncthreads();\n  state = lane < warps",
             "state = lane < warps", LOSS, RULE),
    Mutation("no barrier before the gradient", LOSS_FILE, "{\n    __syncthreads();\n    const RowGradient",
             "{\n    const RowGradient", LOSS, RULE),
    Mutation("no cluster barrier before the sums are read", LOSS_FILE,
             "cluster_barrier();\n    state = Softmax::none();", "state = Softmax::none();", LOSS, "long_rows"),
    Mutation("a block leaves while its sums are read", LOSS_FILE, "cluster_barrier();  // no", "// no", LOSS,
             "blocks_of_a_cluster"),
    Mutation("elements before the row", LOSS_FILE, "begin + i >= 0 && begin + i < classes ? x",
             "begin + i < classes ? x", LOSS, "begin_anywhere"),
    Mutation("elements after the row", LOSS_FILE, "begin + i >= 0 && begin + i < classes ? x", "begin + i >= 0 ? x",
             LOSS, "begin_anywhere"),
    Mutation("vectors where they are not aligned", LOSS_FILE, "if (aligned_alike && x.whole(first))",
             "if (x.whole(first))", LOSS, "begin_anywhere"),
    Mutation("no target in the gradient", LOSS_FILE, "if (at == target) d[i] = g.target;", "", LOSS, RULE),
    Mutation("the softcap's slope", LOSS_FILE, "slope = (1.f - t) * (1.f + t);", "", LOSS, f"{RULE} and softcap"),
    Mutation("ignored rows keep what was there", LOSS_FILE, "c += threads) store(c, zeros);", "c += threads) {}", LOSS,
             RULE),
    Mutation("a bad target passes", LOSS_FILE, "+ 0.0 * x_target", "", LOSS, "out_of_range"),
    Mutation("a's matrices", TILES, "k / 8 + lane / 16", "k / 8 + lane / 8 % 2", BF16, f"{RULE} and bfloat16"),
    Mutation("b's matrices", TILES, "k + matrix % 2 * 8 + within, n / 8 + matrix / 2",
             "k + matrix / 2 * 8 + within, n / 8 + matrix % 2", BF16, f"{RULE} and bfloat16"),
    Mutation("the swizzle", TILES, "load_matrices<false>(r, b.chunk(n + matrix / 2 * 8 + within, k / 8 + matrix % 2))",
             "load_matrices<false>(r, b.data + (n + matrix / 2 * 8 + within) * b.kStride + k + matrix % 2 * 8)", BF16,
             f"{RULE} and bfloat16"),
    Mutation("columns beyond the head's width", TILES, "dim - column < kChunk ? dim - column : kChunk", "kChunk", BF16,
             f"{RULE} and bfloat16"),
    Mutation("asynchronous copies of what is not aligned", TILES, "if (aligned) {", "if (true) {", BF16,
             f"{RULE} and odd and bfloat16"),
    Mutation("no barrier before scratch is written", TILES, "__syncwarp();  // the last", "// the last", FP32,
             f"{RULE} and float32"),
    Mutation("no barrier before scratch is read", TILES, "__syncwarp();\n    multiply<", "multiply<", FP32,
             f"{RULE} and float32"),
    Mutation("a copy not waited for", TILES, "wait_copies<1>", "wait_copies<2>", BF16, f"{RULE} and bfloat16"),
    Mutation("no barrier before the work", TILES, "__syncthreads();\n    work(", "work(", BF16, f"{RULE} and bfloat16"),
    Mutation("no barrier after the work", TILES, "__syncthreads();  // all are done", "// all are done", BF16,
             f"{RULE} and bfloat16"),
    Mutation("the wrong stage", TILES, "load(at + kInner, stage ^ 1)", "load(at + kInner, stage)", BF16,
             f"{RULE} and bfloat16"),
    Mutation("the sums not rescaled", HEADS, "acc[j][2 * h] *= rescale, acc[j][2 * h + 1] *= rescale;", "{}", BF16,
             f"{RULE} and bfloat16"),
    Mutation("the denominator not rescaled", HEADS, "total[h] *= rescale;", "", BF16, f"{RULE} and bfloat16"),
    Mutation("the maximum of half a row", HEADS, "largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 2));",
             "", BF16, f"{RULE} and bfloat16"),
    Mutation("the denominator of half a row", HEADS, "total[h] += __shfl_xor_sync(~0u, total[h], 2);", "", BF16,
             f"{RULE} and bfloat16"),
    Mutation("causal too early", HEADS, "offset <= a.right);", "offset < a.right);", BF16, f"{RULE} and causal"),
    Mutation("a window that begins too late", HEADS, "a.left >= 0 && left > 0 ? left : 0",
             "a.left >= 0 && left > 0 ? left + 1 : 0", BF16, f"{RULE} and window"),
    Mutation("a tile taken for visible", HEADS, "i1 <= queries && j1 <= keys", "i1 <= queries", BF16,
             f"{RULE} and bfloat16 and whole"),
    Mutation("queries too few for a window's keys", HEADS, "p.first + Tiles::kOuter - shift + a.left",
             "p.first - shift + a.left", BF16, f"{RULE} and window"),
    Mutation("dropout's index", HEADS, "return (row + i) * a.dropout_keys + j;", "return row * a.dropout_keys + i + j;",
             BF16, f"{RULE} and dropout"),
    Mutation("no 1 / (1 - p)", HEADS, "float(1.0 / (1.0 - a.dropout_p))", "1.f", BF16, f"{RULE} and dropout"),
    Mutation("the sign of lse's gradient", HEADS, "sum -= a.dlse", "sum += a.dlse", BF16, f"{RULE} and lse"),
    Mutation("one query head of a group", HEADS, "head < (p.head + 1) * group", "head < p.head * group + 1", BF16,
             f"{RULE} and grouped"),
    Mutation("dk without the scale", HEADS, "scale[2] = {a.scale, a.scale}", "scale[2] = {1.f, 1.f}", BF16,
             f"{RULE} and bfloat16"),
    Mutation("tiles of packed sequences", HEADS, "(cu_at(cu, wide, n) / tile_rows + n)) * tile_rows",
             "(cu_at(cu, wide, n) / tile_rows)) * tile_rows", BF16, "varlen_error_rule"),
    Mutation("masked keys", HEADS, "(!kGeneral || !mask || mask[j])", "true", BF16, f"{RULE} and padding"),
    Mutation("the scores' slope", HEADS, "slope = (1.f - t) * (1.f + t);", "", BF16, f"{RULE} and softcap"),
    Mutation("no sink in the denominator", HEADS, "total[h] * rescale + exponential<T>(sink - base)",
             "total[h] * rescale", BF16, f"{RULE} and sinks"),
    Mutation("half of a wide head", HEADS, "warp / (Tiles::kOuter / 16) * kColumns", "0", BF16, f"{RULE} and wide"),
    Mutation("the sign of a sink's gradient", "attention.cu", "sum -= exp(", "sum += exp(", "attention",
             f"{RULE} and sinks"),
    Mutation("terms of a bias's gradient", "attention.cu", "left /= full[i];", "left /= full[i] + 1;", "attention",
             f"{RULE} and bias"),
    Mutation("a product's copy not waited for", GEMM, "wait_copies<kStages - 2>", "wait_copies<kStages - 1>", HEAD_BF16,
             "several_tiles and bfloat16"),
    Mutation("no barrier before a step", GEMM, "__syncthreads();  // this step's", "// this step's", HEAD_BF16,
             "several_tiles and bfloat16"),
    Mutation("a step into the wrong stage", GEMM, "(stage + kStages - 1) % kStages);", "stage);", HEAD_BF16,
             "several_tiles and bfloat16"),
    Mutation("rows not gathered", GEMM, "count && from.index ?", "false ?", HEAD_BF16, f"{RULE} and bfloat16"),
    Mutation("columns beyond the rank", GEMM, "left < kChunk ? left : kChunk", "kChunk", HEAD_BF16,
             f"{RULE} and bfloat16 and lora"),
    Mutation("copies of 16 bytes from anywhere", GEMM, "reinterpret_cast<uintptr_t>(data) % 16 == 0", "true", HEAD_BF16,
             "within_another"),
    Mutation("rows of 16 bytes from anywhere", GEMM, "row_stride * int64_t(sizeof(T)) % 16 == 0", "true", HEAD_BF16,
             "any_strides and bfloat16"),
    Mutation("a's transposed matrices", GEMM, "k + matrix / 2 * 8 + within, r / 8 + matrix % 2",
             "k + matrix % 2 * 8 + within, r / 8 + matrix / 2", HEAD_BF16, f"{RULE} and bfloat16"),
    Mutation("b's transposed matrices", GEMM, "k + matrix % 2 * 8 + within, c / 8 + matrix / 2",
             "k + matrix / 2 * 8 + within, c / 8 + matrix % 2", HEAD_BF16, f"{RULE} and bfloat16"),
    Mutation("rows that do not count", GEMM, "(kADeep ? depth : m) = p.here(kADeep ? depth : m);", "", HEAD_BF16,
             f"{RULE} and bfloat16"),
    Mutation("where the second term begins", GEMM, "step - first_steps : step", "step : step", HEAD_BF16,
             f"{RULE} and bfloat16 and lora"),
    Mutation("a split's steps", GEMM, "begin + each < steps ? begin + each : steps", "steps", HEAD_BF16,
             "several_tiles and bfloat16 and lora"),
    Mutation("a column too many", GEMM, "pairs && c + 1 < gemm.n", "pairs", HEAD_BF16, "test_shapes or any_strides"),
    Mutation("rows of dx where they were gathered", GEMM, "out.index ? out.index[r] : r", "r", HEAD_BF16,
             f"{RULE} and bfloat16"),
    Mutation("fp32 operands", GEMM, "kADeep ? a.at(k, r) : a.at(r, k)", "a.at(r, k)", HEAD_FP32, f"{RULE} and float32"),
    Mutation("classes that are not there", HEAD, "if (!inside) x = -INFINITY;", "", HEAD_BF16,
             f"{RULE} and bfloat16"),
    Mutation("the maximum of half a tile", HEAD, "largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));", "",
             HEAD_BF16, f"{RULE} and bfloat16"),
    Mutation("the sum of half a tile", HEAD, "by = 1; by <= 2", "by = 1; by <= 1", HEAD_BF16, f"{RULE} and bfloat16"),
    Mutation("the logits' scale", HEAD, "(x + bias) * a.logit_scale", "x * a.logit_scale + bias", HEAD_BF16,
             f"{RULE} and bfloat16"),
    Mutation("a tile's exponentials not rescaled", HEAD, "if (!capped) factor *=", "if (false) factor *=", HEAD_BF16,
             f"{RULE} and bfloat16"),
    Mutation("no target in the logits' gradient", HEAD, "if (first + i == target) d[i] = g.target;", "", HEAD_BF16,
             f"{RULE} and bfloat16"),
    Mutation("the head's softcap's slope", HEAD, "slope = (1.f - t) * (1.f + t);", "", HEAD_BF16,
             f"{RULE} and bfloat16 and softcap"),
    Mutation("smoothing in the logits' gradient", HEAD, "g.soft * a.class_weight[first + i] : g.soft", "0.f : 0.f",
             HEAD_BF16, f"{RULE} and bfloat16 and smoothing"),
    Mutation("a chunk's gradients in place of the sum", HEAD, "later = l.begin > 0", "later = false", HEAD_BF16,
             "many_chunks and bfloat16"),
    Mutation("a chunk's bias gradient in place of the sum", HEAD, "l.begin ? l.a.dbias[c] : 0.f", "0.f", HEAD_BF16,
             "many_chunks and bfloat16"),
    Mutation("no barrier before the bias's sums", HEAD, "sum[i];\n  __syncthreads();", "sum[i];", HEAD_BF16,
             f"{RULE} and bfloat16 and bias"),
    Mutation("one part of a narrow product", HEAD, "s < l.splits", "s < 1", HEAD_BF16,
             "several_tiles and bfloat16 and lora"),
    Mutation("the adapter's scaling", HEAD, "sum * l.a.scaling", "sum", HEAD_BF16, f"{RULE} and bfloat16 and lora"),
    Mutation("a warp's rows twice", HEAD_ROWS, "if (w < warp) before", "if (w <= warp) before", HEAD_ALL, RULE),
    Mutation("counts overwritten before they are read", HEAD_ROWS, "__syncthreads();  // all have read", "// all",
             HEAD_ALL, "frozen_head and plain or frozen_head and sum"),
    Mutation("tiles not rescaled", HEAD_ROWS, "s.sum * expf(s.max - shift)", "s.sum", HEAD_ALL, RULE),
    Mutation("a tile's smoothing not rescaled", HEAD_ROWS, "if (w.weights != 0.f) below +=", "if (false) below +=",
             HEAD_ALL, f"{RULE} and smoothing"),
    Mutation("half of a row's tiles", HEAD_ROWS, "x = add(x, __shfl_xor_sync(~0u, x, 16));", "", HEAD_ALL, RULE),
    Mutation("joined before all have read", HEAD_ROWS, "__syncthreads();  // what was", "// what was", HEAD_ALL, RULE),
    Mutation("a bad target of the head passes", HEAD_ROWS, " + 0.0 * z_target", "", HEAD_ALL, "out_of_range"),
    Mutation("p at the target", HEAD_ROWS, "hard * (p - 1.0)", "hard * p", HEAD_ALL, RULE),
    Mutation("h without its scale", LORA, "l.granules[g].scale * a.h[", "a.h[", LORA16, "linear and adapter_dominates"),
    Mutation("h's columns of another adapter", LORA, "+ l.granules[g].column + k];", "+ k];", LORA16, "test_linears"),
    Mutation("no column of ones", LORA, "if (j == l.ones)", "if (false)", LORA16, "bias_dominates"),
    Mutation("rows of the last strip", LORA, "(rows + 31) / 32 * 32", "rows / 32 * 32", LORA16, "linear_shapes"),
    Mutation("every strip's gradient in one place", LORA, "a.outer + ((strip * a.granule_count", "a.outer + ((0",
             LORA16, "several_passes"),
    Mutation("every part's sum in one place", LORA, "a.down[(part * a.rows +", "a.down[(", LORA16, "linear_shapes"),
    Mutation("the next pass overwrites", LORA, "l.a.accumulate = true;", "", LORA16, "rank_70"),
    Mutation("the first pass's granules again", LORA, "a.granules[l.first + g]", "a.granules[g]", LORA16, "rank_70"),
    Mutation("the panel of the first pass again", LORA, "a.panel) + l.first * kLoraGranule * a.ld", "a.panel)", LORA16,
             "rank_70"),
    Mutation("what a granule does not hold is stored", LORA, "k < l.granules[g].count)\n", "true)\n", LORA16,
             "test_linears"),
    Mutation("one granule's sums for all", LORA, "panel(stage), g * kLoraGranule, k)", "panel(stage), 0, k)", LORA16,
             "linear and rank_17"),
    Mutation("masks used before they are drawn", LORA, "draw(at);\n      __syncthreads();", "draw(at);", LORA16,
             "dropout"),
    Mutation("no barrier before what is left is multiplied", LORA, "drop(g, stage);\n          __syncthreads();",
             "drop(g, stage);", LORA16, "dropout or linears"),
    Mutation("no barrier before the next adapter's", LORA, "__syncthreads();  // all are done with it",
             "// all are done", LORA16, "linears or several_passes"),
    Mutation("the first adapter's mask for all", LORA, "mask(adapter)[i * 8 + j]", "mask(0)[i * 8 + j]", LORA16,
             "linears or several_passes"),
    Mutation("words of a row that begins within four", LORA, "return bits >> (e % 4) & 0xFF;", "return bits & 0xFF;",
             LORA16, "dropout_shapes"),
    Mutation("words that a chunk reaches into", LORA, "e % 4 ? 3 : 2;", "2;", LORA16, "dropout_shapes"),
    Mutation("dropout's row", LORA, "uint64_t(first_row + i / 8)", "uint64_t(i / 8)", LORA16, "several_passes"),
    Mutation("half of the kept elements", LORA, "bits >> (2 * i + 1) & 1", "bits >> (2 * i) & 1", LORA16, "dropout"),
    Mutation("fp32: the second half of eight", LORA, "bits >> (4 * vector + i) & 1", "bits >> i & 1", LORA32,
             "dropout"),
    Mutation("a transposed block's quarters", TILES, "k + 16 * half + matrix / 2 * 8 + within, row / 8 + matrix % 2",
             "k + 16 * half + matrix % 2 * 8 + within, row / 8 + matrix / 2", LORA16, "linear_shapes"),
    Mutation("the upper 16 of a transposed depth", TILES, "mma<T>(acc[j], block[1], second);", "", LORA16,
             "linear_shapes"),
    Mutation("the last parts of a sum", "lora.cu", "for (; p < a.count; ++p) sums[0]", "for (; p < 0; ++p) sums[0]",
             "lora", "linear_shapes"),
    Mutation("a panel's rows beyond the matrix", "lora.cu", "row >= from.at + from.rows ||", "", "lora",
             "linear_shapes"),
    Mutation("silu's slope", "lora.cu", "plus + x * plus * minus};\n    }\n    case gelu:",
             "plus + x * plus};\n    }\n    case gelu:", "lora", "test_mlp"),
    Mutation("up's gradient", "lora.cu", "from_float<T>(d * f.value)", "from_float<T>(d * f.slope)", "lora",
             "test_mlp"),
    Mutation("the second of a pair first", "quantized.cu", "i % 2 ? codes[i / 2] & 15",
             "i % 2 == 0 ? codes[i / 2] & 15", "quantized", "test_quantized"),
    Mutation("the next row's scales", "quantized.cu", "border = 0, ++row;", "border = 0;", "quantized",
             "begin_anywhere"),
    Mutation("operands of a product in another order", "quantized.cu", "{w[0][k], w[1][k], w[0][k + 1], w[1][k + 1]}",
             "{w[0][k], w[0][k + 1], w[1][k], w[1][k + 1]}", "quantized", "few_rows"),
    Mutation("no barrier before the warps' parts are added", "quantized.cu",
             "__syncthreads();\n  for (int i = threadIdx", "for (int i = threadIdx", "quantized", "few_rows"),
    Mutation("a row of x too few", "quantized.cu", "if (row < a.rows && left > 0)", "if (row + 1 < a.rows && left > 0)",
             "quantized", "few_rows"),
    Mutation("the low-rank terms forgotten", "quantized.cu", "if (a.add) sum +=", "if (false) sum +=", "quantized",
             "few_rows"),
    Mutation("columns that a warp does not reach", "quantized.cu", "at += kQuantizedWarps * kStep",
             "at += a.columns", "quantized", "few_rows"),
    Mutation("a block of scales for all", "quantized.cu", "at % a.k / a.block_columns];", "0];", "quantized",
             "few_rows"),
    Mutation("a block that ends with its row", "quantized.cu", "if (border > k) border = k;", "", "quantized",
             "begin_anywhere"),
    Mutation("a tile not waited for", GEMM90, "step / kStages % 2);", "step / kStages % 2 ^ 1);", HEAD_BF16, "hopper"),
    Mutation("a stage filled while it is read", GEMM90, "if (round > 0) mbarrier_wait(", "if (false) mbarrier_wait(",
             HEAD_BF16, "hopper"),
    Mutation("a stage freed too soon", GEMM90, "(step - 1) % kStages", "step % kStages", HEAD_BF16, "hopper"),
    Mutation("a stage freed by half of the warps", GEMM90, "kConsumers / 32);", "kConsumers / 64);", HEAD_BF16,
             "hopper"),
    Mutation("a stage freed by a warp's first lane", GEMM90, "__syncwarp();\n        if (lane == 0) mbarrier_arrive",
             "if (lane == 0) mbarrier_arrive", HEAD_BF16, "hopper"),
    Mutation("two products in flight", GEMM90, "wgmma_wait<1>();", "wgmma_wait<2>();", HEAD_BF16, "hopper"),
    Mutation("the last product not waited for", GEMM90, "wgmma_wait<0>();", "", HEAD_BF16, "hopper"),
    Mutation("16 depths further", GEMM90, "b + k * 16 * 128", "b + k * 32", HEAD_BF16, "hopper"),
    Mutation("the next 64 columns", GEMM90, "k * 16 * 128, kBBytes / 2)", "k * 16 * 128)", HEAD_BF16, "hopper"),
    Mutation("columns copied twice", GEMM90, "int(column) + 64, at", "int(column), at", HEAD_BF16, "hopper"),
    Mutation("a warp group's rows", GEMM90, "warp_row / 128 * 128 * 128", "0", HEAD_BF16, "hopper"),
    Mutation("the adapter's boxes", GEMM90, "&boxes.a[second]", "&boxes.a[0]", HEAD_BF16, "hopper"),
    Mutation("a product's tile not waited for", LORA90, "step / kStages % 2);\n      wgmma_fence",
             "step / kStages % 2 ^ 1);\n      wgmma_fence", LORA90_16, ON90),
    Mutation("a ring's stage filled while it is read", LORA90, "if (round > 0) mbarrier_wait(",
             "if (false) mbarrier_wait(", LORA90_16, ON90),
    Mutation("the phase of a freed stage", LORA90, "(round - 1) % 2", "round % 2", LORA90_16, ON90),
    Mutation("a ring that begins anew with each tile", LORA90, "multiply<true>(l.terms[i].depth, step, sums)",
             "multiply<true>(l.terms[i].depth, step = 0, sums)", LORA90_16, ON90),
    Mutation("a ring's stage freed too soon", LORA90, "if (read < step) release", "if (read <= step) release",
             LORA90_16, ON90),
    Mutation("a stage freed for its own block alone", LORA90, "if (threadIdx.x % 32 < kBlocks) mbarrier",
             "if (threadIdx.x % 32 < 1) mbarrier", LORA90_16, ON90),
    Mutation("a stage freed by one block's warps", LORA90, "kBlocks * kConsumers / 32", "kConsumers / 32", LORA90_16,
             ON90),
    Mutation("a stage freed by a warp's first lanes", LORA90, "__syncwarp();\n    if (threadIdx.x % 32 < kBlocks)",
             "if (threadIdx.x % 32 < kBlocks)", LORA90_16, ON90),
    Mutation("a term's products still in flight", LORA90, "wgmma_wait<0>();", "", LORA90_16, ON90),
    Mutation("a step's products still in flight", LORA90, "wgmma_wait<1>();", "wgmma_wait<2>();", LORA90_16, ON90),
    Mutation("the next 64 columns of a deep tile", LORA90, "wgmma_descriptor(b + k * 16 * 128, kBoxBytes)",
             "wgmma_descriptor(b + k * 16 * 128)", LORA90_16, ON90),
    Mutation("16 depths further in a deep tile", LORA90, "b + k * 16 * 128", "b + k * 32", LORA90_16, ON90),
    Mutation("the other block's half of b", LORA90, "at, column + rank * (kColumns / 2)", "at, column", LORA90_16,
             ON90),
    Mutation("the other block's half of a deep b", LORA90, "column + box * 64, at}", "column + box % 2 * 64, at}",
             LORA90_16, ON90),
    Mutation("another warp group's rows", LORA90, "group() * 64 * 128;", "0;", LORA90_16, ON90),
    Mutation("the last depths of a term", LORA90, "(depth % kDepth + 15) / 16", "depth % kDepth / 16", LORA90_16, ON90),
    Mutation("no bias in a product", LORA90, "if (result.bias) {", "if (false) {", LORA90_16, ON90),
    Mutation("a bias for half of the rows", LORA90, ", sums[4 * j + e + 2] += x;", ";", LORA90_16, ON90),
    Mutation("a bias of fp32 read as 16-bit", LORA90, "result.bias_wide ?", "false ?", LORA90_16, ON90),
    Mutation("a result overwritten before it has left", LORA90, "if (leads()) wait_stores<0>();\n      named",
             "named", LORA90_16, ON90),
    Mutation("no barrier before a result is written", LORA90, "named_barrier(1 + group(), 128);  // what was",
             "// what was", LORA90_16, ON90),
    Mutation("a result that no fence made visible", LORA90, "fence_async();", "", LORA90_16, ON90),
    Mutation("no barrier before a result leaves", LORA90, "fence_async();\n      named_barrier(1 + group(), 128);",
             "fence_async();", LORA90_16, ON90),
    Mutation("a block ends before its results have left", LORA90, "if (leads()) wait_stores<0>();\n  }", "}",
             LORA90_16, ON90),
    Mutation("a result's swizzle", LORA90, "(j % 8 ^ r % 8) * 16", "j % 8 * 16", LORA90_16, ON90),
    Mutation("the first group's rows again", LORA90, "(first + in_group % rows)", "(in_group % rows)", LORA90_16, ON90),
    Mutation("every result's first columns", LORA90, "column -= this->columns(result)", "column = 0", LORA90_16, ON90),
    Mutation("a block leaves while the other writes to it", LORA90, "cluster_barrier();  // no block", "// no block",
             LORA90_16, ON90),
    Mutation("a cluster that is not there yet", LORA90, "block.begin();\n  cluster_barrier();",
             "block.begin();\n  __syncthreads();", LORA90_16, ON90),
    Mutation("an operand without its scale", "lora.cu", "g.scale * l.a.h", "l.a.h", "lora", ON90),
    Mutation("an operand's columns that are not there", "lora.cu", "k < g.count ? g.scale", "true ? g.scale", "lora",
             ON90),
    Mutation("TMA from anywhere", "lora.cu", "reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld", "ld", "lora",
             "sm_90a and only_look"),
    Mutation("TMA of rows of any length", "lora.cu", "ld % 8 == 0 &&", "", "lora", "sm_90a and linear_shapes"),
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
        op = re.sub("(90)?_(fp32|bf16|fp16)$", "", mutation.kernel)
        return mutations.fails(copy, mutation, f"tests/cuda/test_op_{op}.py")


if __name__ == "__main__":
    sys.exit(mutations.main(__doc__, MUTATIONS, caught))
