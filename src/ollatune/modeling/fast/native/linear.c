// Linear layers, with what adapters.c and rowwise.c define.

#include "blocks.h"
#include "tiles.h"

// y [T, N] = Σ_parts x · w  +  drop(low · up)  +  bias  +  residual, summed in fp32 and rounded once.
//
// A part is x [T, K] (row-major, K even) times w: [N, K] read across if `transposed` (y = x · wᵀ), else [K, N]. Panels
// of w, 32 outputs wide, are laid out as pairs of inputs in a buffer that the second-level cache holds, and rows of x
// walk past them. N is a multiple of 32, and so is K where `transposed`. No sum is split between threads. w is of ggml
// type `w_type` (`blocks.h`), its rows `w_stride` bytes apart: blocks are decoded as they are laid out.
enum { MAX_PARTS = 4, PANEL_BYTES = 512 << 10 };
typedef struct {
    const bf16 *x;
    const uint8_t *w;
    long x_stride, w_stride, w_type, K, transposed;
} Part;
typedef struct {
    bf16 *y;
    const bf16 *residual, *bias, *low;
    const int32_t *up;  // pairs of low-rank values: up[low_pairs][N], rows `up_stride` apart
    long N, y_stride, residual_stride, low_stride, up_stride, low_pairs, parts;
    Part part[MAX_PARTS];
} Output;

// What happens to the sums besides being written to y. ACTIVATE: the outputs are gate and up, `product` [T, N] gets
// activation(gate) · up. DERIVE: the one output is the gradient of that product and is not written; `d_gate` and
// `d_up` (rows `d_stride` apart) are, and the product again.
enum { PLAIN = 0, ACTIVATE = 1, DERIVE = 2 };
typedef struct {
    Output output[MAX_LAYERS];
    long outputs, T, then, activation;
    const bf16 *gate, *up;
    bf16 *d_gate, *d_up, *product;
    long gate_stride, d_stride;
    const Adapters *adapters;  // their dropout falls on low · up; may be NULL
    int threads;
} Linear;

// The panel of `column` of one part: [K / 2][PANEL].
INLINE void pack_part(int32_t *out, const Part *part, long column, int type) {
    const uint8_t *w = part->w;
    long stride = part->w_stride;
    for (long k = 0; part->transposed && k < part->K / 2; k += 16)
        for (long v = 0; v < PANEL; v += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = decode32(type, w + (column + v + i) * stride, 2 * k);
            transpose_registers(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (k + i) * PANEL + v, r[i]);
        }
    if (part->transposed) return;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Weight i of the first row beside weight i of the second one, which are numbered from 32 on.
    const __m512i first = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(16 << 16 | 16));
    for (long k = 0; k < part->K / 2; k++) {
        __m512i low = decode32(type, w + 2 * k * stride, column), high = decode32(type, w + (2 * k + 1) * stride, column);
        _mm512_storeu_si512(out + k * PANEL, _mm512_permutex2var_epi16(low, first, high));
        _mm512_storeu_si512(out + k * PANEL + 16, _mm512_permutex2var_epi16(low, second, high));
    }
}

// The panel of `column` of all parts, one after another.
static void pack_panel(int32_t *out, const Output *o, long column) {
    for (long p = 0; p < o->parts; p++) {
        const Part *part = &o->part[p];
        switch (part->w_type) {
#define PACK(TYPE)                                                                                                     \
    case TYPE:                                                                                                         \
        pack_part(out, part, column, TYPE);                                                                            \
        break;
            PACK(BF16) PACK(Q4_0) PACK(Q4_1) PACK(Q5_0) PACK(Q5_1) PACK(Q8_0) PACK(Q4_K) PACK(Q5_K) PACK(Q6_K)
#undef PACK
        }
        out += part->K / 2 * PANEL;
    }
}

INLINE void decode_row(const uint8_t *row, bf16 *out, long columns, int type) {
    for (long at = 0; at < columns; at += 32) _mm512_storeu_si512(out + at, decode32(type, row, at));
}

// Rows `ids` [n] of a weight in blocks to out [n, columns]; columns is a multiple of 32.
void decode_rows(const uint8_t *w, long row_bytes, long type, const int64_t *ids, long n, bf16 *out, long columns,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < n; i++) {
        const uint8_t *row = w + ids[i] * row_bytes;
        switch (type) {
#define DECODE(TYPE)                                                                                                   \
    case TYPE:                                                                                                         \
        decode_row(row, out + i * columns, columns, TYPE);                                                             \
        break;
            DECODE(Q4_0) DECODE(Q4_1) DECODE(Q5_0) DECODE(Q5_1) DECODE(Q8_0) DECODE(Q4_K) DECODE(Q5_K) DECODE(Q6_K)
#undef DECODE
        }
    }
}

static long panel_size(const Output *o) {
    long size = 0;
    for (long p = 0; p < o->parts; p++) size += o->part[p].K / 2 * PANEL;
    return size;
}

// M rows from `row` on of the panel of `column`: to `sums` [M][PANEL] in fp32 if given, else to y.
#define LINEAR_TILE(M)                                                                                                 \
    static void linear_tile_##M(const Output *o, const Adapters *dropping, const int32_t *panel, long row,             \
                                long column, float *sums) {                                                            \
        v16 c[M][2];                                                                                                   \
        for (int m = 0; m < M; m++) c[m][0] = c[m][1] = _mm512_setzero_ps();                                           \
        const int32_t *low = (const int32_t *)(o->low + row * o->low_stride), *up = o->up + column;                    \
        long low_stride = o->low_stride / 2, up_stride = o->up_stride;                                                 \
        for (long k = 0; k < o->low_pairs; k++) {                                                                      \
            __m512i b0 = _mm512_loadu_si512(up + k * up_stride), b1 = _mm512_loadu_si512(up + k * up_stride + 16);     \
            for (int m = 0; m < M; m++) {                                                                              \
                __m512i a = _mm512_set1_epi32(low[m * low_stride + k]);                                                \
                c[m][0] = _mm512_dpbf16_ps(c[m][0], (__m512bh)a, (__m512bh)b0);                                        \
                c[m][1] = _mm512_dpbf16_ps(c[m][1], (__m512bh)a, (__m512bh)b1);                                        \
            }                                                                                                          \
        }                                                                                                              \
        if (dropping && o->low_pairs)                                                                                  \
            for (int m = 0; m < M; m++)                                                                                \
                for (int v = 0; v < 2; v++) c[m][v] = dropped(dropping, c[m][v], row + m, column + 16 * v);            \
        for (long p = 0; p < o->parts; p++) {                                                                          \
            const Part *part = &o->part[p];                                                                            \
            const int32_t *x = (const int32_t *)(part->x + row * part->x_stride);                                      \
            long stride = part->x_stride / 2, pairs = part->K / 2;                                                     \
            for (long k = 0; k < pairs; k++) {                                                                         \
                __m512i b0 = _mm512_loadu_si512(panel + k * PANEL), b1 = _mm512_loadu_si512(panel + k * PANEL + 16);   \
                for (int m = 0; m < M; m++) {                                                                          \
                    __m512i a = _mm512_set1_epi32(x[m * stride + k]);                                                  \
                    c[m][0] = _mm512_dpbf16_ps(c[m][0], (__m512bh)a, (__m512bh)b0);                                    \
                    c[m][1] = _mm512_dpbf16_ps(c[m][1], (__m512bh)a, (__m512bh)b1);                                    \
                }                                                                                                      \
            }                                                                                                          \
            panel += pairs * PANEL;                                                                                    \
        }                                                                                                              \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int v = 0; v < 2; v++) {                                                                              \
                long at = column + 16 * v;                                                                             \
                v16 y = c[m][v];                                                                                       \
                if (o->bias) y = _mm512_add_ps(y, load_bf16(o->bias + at, 0xFFFF));                                    \
                if (o->residual)                                                                                       \
                    y = _mm512_add_ps(y, load_bf16(o->residual + (row + m) * o->residual_stride + at, 0xFFFF));        \
                if (sums) _mm512_storeu_ps(sums + m * PANEL + 16 * v, y);                                              \
                else store_bf16(o->y + (row + m) * o->y_stride + at, y, 0xFFFF);                                       \
            }                                                                                                          \
    }
LINEAR_TILE(1) LINEAR_TILE(2) LINEAR_TILE(3) LINEAR_TILE(4) LINEAR_TILE(5) LINEAR_TILE(6)
LINEAR_TILE(7) LINEAR_TILE(8) LINEAR_TILE(9) LINEAR_TILE(10) LINEAR_TILE(11) LINEAR_TILE(12)
typedef void (*linear_fn)(const Output *, const Adapters *, const int32_t *, long, long, float *);
static const linear_fn linear_tiles[ROWS] = {linear_tile_1, linear_tile_2, linear_tile_3, linear_tile_4,
                                             linear_tile_5, linear_tile_6, linear_tile_7, linear_tile_8,
                                             linear_tile_9, linear_tile_10, linear_tile_11, linear_tile_12};

// One unit of columns: a panel of one output, or (ACTIVATE) the same panel of gate and up.
static void linear_unit(const Linear *l, const int32_t *panel, long row, long rows, long which, long column) {
    const Adapters *dropping = l->adapters && l->adapters->dropout > 0 ? l->adapters : 0;
    linear_fn tile = linear_tiles[rows - 1];
    const Output *o = &l->output[which];
    if (l->then == DERIVE) {
        float sums[ROWS * PANEL] __attribute__((aligned(64)));
        tile(o, dropping, panel, row, column, sums);
        for (long m = 0; m < rows; m++)
            for (long i = 0; i < PANEL; i += 16) {
                long at = (row + m) * l->gate_stride + column + i, to = (row + m) * l->d_stride + column + i;
                derive16(_mm512_load_ps(sums + m * PANEL + i), l->gate + at, l->up + at, l->d_gate + to, l->d_up + to,
                         l->product + (row + m) * o->N + column + i, (int)l->activation, 0xFFFF);
            }
        return;
    }
    tile(o, dropping, panel, row, column, 0);
    if (l->then != ACTIVATE) return;
    const Output *up = o + 1;
    tile(up, dropping, panel + panel_size(o), row, column, 0);
    for (long m = 0; m < rows; m++)
        for (long i = 0; i < PANEL; i += 16)
            gate16(o->y + (row + m) * o->y_stride + column + i, up->y + (row + m) * up->y_stride + column + i,
                   l->product + (row + m) * o->N + column + i, (int)l->activation, 0xFFFF);
}

// Returns 0, or 1 without memory.
int linear(const Linear *l) {
    const long together = l->then == ACTIVATE ? 2 : 1;
    long units = 0, largest = 0, blocks = (l->T + ROWS - 1) / ROWS;
    for (long i = 0; i < l->outputs; i += together) {
        long size = panel_size(&l->output[i]) * together;
        units += l->output[i].N / PANEL;
        largest = size > largest ? size : largest;
    }
    // Threads share out columns first (each panel is then laid out once), rows where columns are too few. Laying a
    // panel out costs about as much as two blocks of rows.
    long wide = 1, best = 0;
    for (long w = 1; w <= l->threads; w++) {
        long tall = l->threads / w, cost = (units + w - 1) / w * ((blocks + tall - 1) / tall + 2);
        if (!best || cost <= best) best = cost, wide = w;
    }
    long tall = l->threads / wide, most = largest ? PANEL_BYTES / (largest * (long)sizeof(int32_t)) : units;
    int failed = 0;
#pragma omp parallel num_threads(l->threads)
    {
        long id = omp_get_thread_num(), given = omp_get_num_threads();
        // With fewer threads than asked for, the first ones take the others' parts as well.
        for (long share = id; share < wide * tall; share += given) {
            long first = units * (share % wide) / wide, last = units * (share % wide + 1) / wide;
            long from = blocks * (share / wide) / tall * ROWS, to = blocks * (share / wide + 1) / tall * ROWS;
            if (to > l->T) to = l->T;
            if (first >= last || from >= to) continue;
            long per = last - first < most ? last - first : most > 0 ? most : 1;
            per = (last - first + (last - first + per - 1) / per - 1) / ((last - first + per - 1) / per);
            int32_t *panels = aligned_alloc(64, (size_t)(per * largest * (long)sizeof(int32_t) + 64) / 64 * 64);
            if (!panels) {
                failed = 1;
                continue;
            }
            for (long begin = first; begin < last; begin += per) {
                long end = begin + per < last ? begin + per : last;
                for (long t = from; t < to;) {
                    // Rows in blocks of about equal height at the end: a tile of few rows wastes its loads.
                    long left = to - t, rows = left <= ROWS ? left : left < 2 * ROWS ? (left + 1) / 2 : ROWS;
                    long which = 0, unit = begin;
                    while (unit >= l->output[which].N / PANEL) unit -= l->output[which].N / PANEL, which += together;
                    for (long u = begin; u < end; u++) {
                        int32_t *panel = panels + (u - begin) * largest;
                        if (t == from)
                            for (long i = 0, size = 0; i < together; size += panel_size(&l->output[which + i]), i++)
                                pack_panel(panel + size, &l->output[which + i], unit * PANEL);
                        linear_unit(l, panel, t, rows, which, unit * PANEL);
                        if (++unit == l->output[which].N / PANEL) unit = 0, which += together;
                    }
                    t += rows;
                }
            }
            free(panels);
        }
    }
    return failed;
}
