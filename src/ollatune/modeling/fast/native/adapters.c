// Low-rank adapters.

#include "tiles.h"

// Linear layers with one input x [T, I], each with an adapter: y_l += s_l · B_l (A_l drop(x)). Layer l has `outputs[l]`
// outputs and rank `ranks[l]`; A_l is [r, I], B_l [O, r], fp32. The low-rank values of all layers stand side by side in
// rows of `width` (a multiple of 16), layer l's from `low_at[l]` (even) on. `packs` is scratch of `lora_pack_size`
// int32, filled by `lora_low` and read on the way back.
enum { MAX_LAYERS = 4, MAX_RANK = 64, ROWS = 12, PANEL = 32 };
typedef struct {
    long layers, inputs, width;
    long outputs[MAX_LAYERS], ranks[MAX_LAYERS], low_at[MAX_LAYERS], strides[MAX_LAYERS];
    bf16 *y[MAX_LAYERS];  // the outputs, or on the way back their gradients
    const float *A[MAX_LAYERS], *B[MAX_LAYERS];
    float scales[MAX_LAYERS];
    int32_t *packs;
    float dropout;
    uint32_t seed_low, seed_high;
    int threads;
} Adapters;

INLINE long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

INLINE v16 gathered(const float *p, __m512i index, __mmask16 m) {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, index, p, 4);
}

// Where the four layouts lie in `packs`: A for x·Aᵀ [I/2][width] and for low·A [width/2][I]; of each layer s·B for
// low·Bᵀ [r/2][O] and for y·B [O/2][r up to 16].
static int32_t *pack_A_down(const Adapters *a) { return a->packs; }
static int32_t *pack_A_up(const Adapters *a) { return a->packs + a->inputs / 2 * a->width; }
static int32_t *pack_B(const Adapters *a, long layer, int down) {
    int32_t *at = a->packs + a->inputs * a->width;
    for (long l = 0; l < a->layers; l++) {
        long up = up_to(a->ranks[l], 2) / 2 * a->outputs[l];
        if (l == layer && !down) return at;
        at += up;
        if (l == layer) return at;
        at += a->outputs[l] / 2 * up_to(a->ranks[l], 16);
    }
    return at;
}

long lora_pack_size(const Adapters *a) { return pack_B(a, a->layers, 0) - a->packs; }

static void pack(const Adapters *a) {
    const long I = a->inputs;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for schedule(static)
        for (long k = 0; k < I / 2; k++) memset(pack_A_down(a) + k * a->width, 0, sizeof(int32_t) * a->width);
#pragma omp for schedule(static)
        for (long k = 0; k < a->width / 2; k++) memset(pack_A_up(a) + k * I, 0, sizeof(int32_t) * I);
        for (long l = 0; l < a->layers; l++) {
            const long r = a->ranks[l], O = a->outputs[l], wide = up_to(r, 16);
            const float *A = a->A[l], *B = a->B[l];
            const v16 scale = set1(a->scales[l]);
            int32_t *up = pack_B(a, l, 0), *down = pack_B(a, l, 1);
            const __m512i by_row = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)I));
#pragma omp for schedule(static)
            for (long k = 0; k < I / 2; k++)
                for (long j = 0; j < r; j += 16) {
                    __mmask16 m = tail(r - j);
                    const float *from = A + j * I + 2 * k;
                    _mm512_mask_storeu_epi32(pack_A_down(a) + k * a->width + a->low_at[l] + j, m,
                                             bf16_pairs(gathered(from, by_row, m), gathered(from + 1, by_row, m)));
                }
#pragma omp for schedule(static)
            for (long j = 0; j < (r + 1) / 2; j++)
                for (long i = 0; i < I; i += 16) {
                    v16 high = 2 * j + 1 < r ? _mm512_loadu_ps(A + (2 * j + 1) * I + i) : _mm512_setzero_ps();
                    _mm512_storeu_si512(pack_A_up(a) + (a->low_at[l] / 2 + j) * I + i,
                                        bf16_pairs(_mm512_loadu_ps(A + 2 * j * I + i), high));
                }
            const __m512i by_output = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)r));
#pragma omp for schedule(static)
            for (long o = 0; o < O; o += 16)
                for (long j = 0; j < (r + 1) / 2; j++) {
                    v16 low = gathered(B + o * r + 2 * j, by_output, 0xFFFF);
                    v16 high = 2 * j + 1 < r ? gathered(B + o * r + 2 * j + 1, by_output, 0xFFFF) : _mm512_setzero_ps();
                    _mm512_storeu_si512(up + j * O + o, bf16_pairs(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
                }
#pragma omp for schedule(static)
            for (long o = 0; o < O / 2; o++)
                for (long j = 0; j < wide; j += 16) {
                    __mmask16 m = j < r ? tail(r - j) : 0;
                    v16 low = _mm512_maskz_loadu_ps(m, B + 2 * o * r + j);
                    v16 high = _mm512_maskz_loadu_ps(m, B + (2 * o + 1) * r + j);
                    _mm512_storeu_si512(down + o * wide + j, bf16_pairs(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
                }
        }
    }
}

// Which of 16 inputs from (row, column) on the adapters see: a hash of the place and the seed (murmur's finaliser,
// twice) against the probability, so nothing needs to be kept.
INLINE __mmask16 kept(const Adapters *a, long row, long column) {
    uint64_t place = (uint64_t)row * (uint64_t)a->inputs + (uint64_t)column;
    __m512i h = _mm512_add_epi32(_mm512_set1_epi32((int)(uint32_t)place),
                                 _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    h = _mm512_xor_si512(h, _mm512_set1_epi32((int)a->seed_low));
    for (int round = 0; round < 2; round++) {
        h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
        h = _mm512_mullo_epi32(h, _mm512_set1_epi32((int)0x85EBCA6Bu));
        h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 13));
        h = _mm512_mullo_epi32(h, _mm512_set1_epi32((int)0xC2B2AE35u));
        h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
        h = _mm512_add_epi32(h, _mm512_set1_epi32((int)(a->seed_high + (uint32_t)(place >> 32))));
    }
    return _mm512_cmpge_epu32_mask(h, _mm512_set1_epi32((int)(uint32_t)((double)a->dropout * 4294967296.0)));
}

// 16 inputs as the adapters see them.
INLINE v16 dropped(const Adapters *a, v16 x, long row, long column) {
    if (a->dropout <= 0) return x;
    return _mm512_maskz_mul_ps(kept(a, row, column), x, set1(1 / (1 - a->dropout)));
}

// out[rows][lanes] (bf16, row stride `out_stride`, the first `keep` columns) = x[rows][2 · pairs] · packed[pairs][lanes].
static void low_block(bf16 *out, long out_stride, long keep, const bf16 *x, long x_stride, const int32_t *packed,
                      long lanes, long rows, long pairs) {
    float C[ROWS * 32] __attribute__((aligned(64)));
    for (long n = 0; n < keep; n += 32) {
        long vectors = (lanes - n < 32 ? lanes - n : 32) / 16;
        tiles[rows - 1][vectors - 1](C, 32, (const int32_t *)x, x_stride / 2, 1, packed + n, lanes, pairs, 0);
        for (long m = 0; m < rows; m++)
            for (long v = 0; v < vectors && n + 16 * v < keep; v++)
                store_bf16(out + m * out_stride + n + 16 * v, _mm512_load_ps(C + m * 32 + 16 * v), tail(keep - n - 16 * v));
    }
}

// Fills `packs`; low [T, width] = drop(x) · Aᵀ.
void lora_low(const Adapters *a, const bf16 *x, long x_stride, bf16 *low, long T) {
    pack(a);
#pragma omp parallel num_threads(a->threads)
    {
        bf16 *seen = a->dropout > 0 ? malloc(sizeof(bf16) * ROWS * a->inputs) : 0;
#pragma omp for schedule(static)
        for (long block = 0; block < (T + ROWS - 1) / ROWS; block++) {
            long t = block * ROWS, rows = T - t < ROWS ? T - t : ROWS;
            const bf16 *from = x + t * x_stride;
            long stride = x_stride;
            if (seen) {
                for (long m = 0; m < rows; m++)
                    for (long i = 0; i < a->inputs; i += 16)
                        store_bf16(seen + m * a->inputs + i, dropped(a, load_bf16(from + m * stride + i, 0xFFFF), t + m, i), 0xFFFF);
                from = seen, stride = a->inputs;
            }
            low_block(low + t * a->width, a->width, a->width, from, stride, pack_A_down(a), a->width, rows, a->inputs / 2);
        }
        free(seen);
    }
}

// Sums over positions: C[M][n] = Σ_t left[t][m] · right[t][column + n] for `count` columns (at most OUTER). `left` as
// pairs of rows: left[m][ceil(T / 2)]. Blocks of rows are read whole, a few cache lines of each: columns alone would
// jump from page to page.
enum { OUTER = 128, OUTER_ROWS = 64 };
static void outer_block(const Adapters *a, int drop, float *C, long M, long column, long count, const int32_t *left,
                        const bf16 *right, long stride, long T) {
    int32_t pairs[OUTER_ROWS / 2 * PANEL] __attribute__((aligned(64)));
    const long row_pairs = (T + 1) / 2;
    for (long t = 0; t < T; t += OUTER_ROWS) {
        long rows = T - t < OUTER_ROWS ? T - t : OUTER_ROWS;
        for (long n = 0; n < count; n += PANEL) {
            long lanes = count - n < PANEL ? count - n : PANEL;
            for (long j = 0; j < rows; j += 2)
                for (long v = 0; v < lanes; v += 16) {
                    const bf16 *from = right + (t + j) * stride + column + n + v;
                    v16 low = load_bf16(from, 0xFFFF), high = _mm512_setzero_ps();
                    if (j + 1 < rows) high = load_bf16(from + stride, 0xFFFF);
                    if (drop) {
                        low = dropped(a, low, t + j, column + n + v);
                        high = dropped(a, high, t + j + 1, column + n + v);
                    }
                    _mm512_store_si512(pairs + j / 2 * PANEL + v, bf16_pairs(low, high));
                }
            product(C + n, OUTER, left + t / 2, row_pairs, 1, pairs, PANEL, M, lanes, (rows + 1) / 2, t > 0);
        }
    }
}

// Columns that a thread takes at a time: about the same number each time, for as many times as there are threads.
INLINE long outer_share(long columns, int threads) {
    long shares = up_to((columns > 0 ? columns + OUTER - 1 : OUTER) / OUTER, threads);
    return columns > 0 ? up_to((columns + shares - 1) / shares, PANEL) : PANEL;
}

// [T, width] → pairs of neighbouring rows for each column: out[width][ceil(T / 2)].
static void pair_columns(int32_t *out, const bf16 *low, long T, long width, int threads) {
    long row_pairs = (T + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < row_pairs; p += 16)
        for (long c = 0; c < width; c += 16) {
            __m512i block[16];
            for (long i = 0; i < 16; i++) {
                const bf16 *from = low + 2 * (p + i) * width + c;
                v16 first = 2 * (p + i) < T ? load_bf16(from, 0xFFFF) : _mm512_setzero_ps();
                v16 second = 2 * (p + i) + 1 < T ? load_bf16(from + width, 0xFFFF) : _mm512_setzero_ps();
                block[i] = bf16_pairs(first, second);
            }
            transpose_registers(block);
            for (long i = 0; i < 16; i++) _mm512_mask_storeu_epi32(out + (c + i) * row_pairs + p, tail(row_pairs - p), block[i]);
        }
}

// From the gradients y_l of the outputs: d_low [T, width] = s · y · B, and d_B ([O, r] of each layer, one after
// another). `columns` is scratch of width · ceil(T / 2) int32. Ranks up to 64.
void lora_outputs(const Adapters *a, const bf16 *low, bf16 *d_low, float *d_B, int32_t *columns, long T) {
    const long row_pairs = (T + 1) / 2;
    pair_columns(columns, low, T, a->width, a->threads);
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for schedule(static) nowait
        for (long block = 0; block < (T + ROWS - 1) / ROWS; block++) {
            long t = block * ROWS, rows = T - t < ROWS ? T - t : ROWS;
            for (long m = 0; m < rows; m++) memset(d_low + (t + m) * a->width, 0, sizeof(bf16) * a->width);
            for (long l = 0; l < a->layers; l++)
                if (a->ranks[l])
                    low_block(d_low + t * a->width + a->low_at[l], a->width, a->ranks[l], a->y[l] + t * a->strides[l],
                              a->strides[l], pack_B(a, l, 1), up_to(a->ranks[l], 16), rows, a->outputs[l] / 2);
        }
        float C[MAX_RANK * OUTER] __attribute__((aligned(64)));
        float *at = d_B;
        for (long l = 0; l < a->layers; l++) {
            const long r = a->ranks[l], O = a->outputs[l], share = outer_share(O, a->threads);
#pragma omp for schedule(static) nowait
            for (long o = 0; o < (r ? O : 0); o += share) {
                long count = O - o < share ? O - o : share;
                outer_block(a, 0, C, r, o, count, columns + a->low_at[l] * row_pairs, a->y[l], a->strides[l], T);
                for (long c = 0; c < count; c++)
                    for (long m = 0; m < r; m++) at[(o + c) * r + m] = a->scales[l] * C[m * OUTER + c];
            }
            at += O * r;
        }
    }
}

// d_A ([r, I] of each layer, one after another) = d_lowᵀ · drop(x).
void lora_inputs(const Adapters *a, const bf16 *x, long x_stride, const bf16 *d_low, float *d_A, int32_t *columns, long T) {
    const long I = a->inputs, share = outer_share(I, a->threads);
    long used = 0;
    for (long l = 0; l < a->layers; l++)
        if (a->ranks[l]) used = a->low_at[l] + a->ranks[l];
    pair_columns(columns, d_low, T, a->width, a->threads);
#pragma omp parallel num_threads(a->threads)
    {
        float C[MAX_LAYERS * MAX_RANK * OUTER] __attribute__((aligned(64)));
#pragma omp for schedule(static)
        for (long i = 0; i < I; i += share) {
            long count = I - i < share ? I - i : share;
            outer_block(a, a->dropout > 0, C, used, i, count, columns, x, x_stride, T);
            float *at = d_A;
            for (long l = 0; l < a->layers; l++)
                for (long m = 0; m < a->ranks[l]; m++, at += I)
                    memcpy(at + i, C + (a->low_at[l] + m) * OUTER, sizeof(float) * (size_t)count);
        }
    }
}
