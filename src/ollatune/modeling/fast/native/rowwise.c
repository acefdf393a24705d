// Kernels that go through rows one by one: norms, gated activation, cross-entropy, rotary embedding.

#include "common.h"

// ---------------------------------------------------------------- RMSNorm

// y = x · inverse · gain, inverse = 1 / sqrt(mean(x²) + epsilon), for each row of x [T, D].
void norm_forward(const bf16 *x, const float *gain, float epsilon, bf16 *y, float *inverse, long T, long D,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        const bf16 *xt = x + t * D;
        v16 squares = _mm512_setzero_ps();
        for (long i = 0; i < D; i += 16) {
            __mmask16 m = tail(D - i);
            v16 v = load_bf16(xt + i, m);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)D + epsilon);
        inverse[t] = scale;
        for (long i = 0; i < D; i += 16) {
            __mmask16 m = tail(D - i);
            v16 v = _mm512_mul_ps(load_bf16(xt + i, m), set1(scale));
            store_bf16(y + t * D + i, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, gain + i)), m);
        }
    }
}

// dx = inverse · (dy · gain − x · inverse² · mean(dy · gain · x)) + residual (if any), and y again.
void norm_backward(const bf16 *dy, const bf16 *x, const float *inverse, const float *gain, const bf16 *residual,
                   bf16 *dx, bf16 *y, long T, long D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        v16 dot = _mm512_setzero_ps();
        for (long i = 0; i < D; i += 16) {
            __mmask16 m = tail(D - i);
            v16 g = _mm512_mul_ps(load_bf16(dy + t * D + i, m), _mm512_maskz_loadu_ps(m, gain + i));
            dot = _mm512_fmadd_ps(g, load_bf16(x + t * D + i, m), dot);
        }
        float inv = inverse[t];
        float mean = _mm512_reduce_add_ps(dot) / (float)D * inv * inv;
        for (long i = 0; i < D; i += 16) {
            __mmask16 m = tail(D - i);
            v16 g = _mm512_mul_ps(load_bf16(dy + t * D + i, m), _mm512_maskz_loadu_ps(m, gain + i));
            v16 value = load_bf16(x + t * D + i, m), v = _mm512_fnmadd_ps(value, set1(mean), g);
            v16 more = residual ? load_bf16(residual + t * D + i, m) : _mm512_setzero_ps();
            store_bf16(dx + t * D + i, _mm512_fmadd_ps(v, set1(inv), more), m);
            value = _mm512_mul_ps(value, set1(inv));
            store_bf16(y + t * D + i, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(m, gain + i)), m);
        }
    }
}

// ---------------------------------------------------------------- gated activation

enum { SILU = 0, GELU_TANH = 1 };

// The activation's value and, by `slope`, its derivative.
INLINE v16 activate(v16 x, int kind, v16 *slope) {
    if (kind == SILU) {
        v16 s = rough_sigmoid16(x);
        v16 value = _mm512_mul_ps(x, s);
        *slope = _mm512_add_ps(s, _mm512_mul_ps(value, _mm512_sub_ps(set1(1.0f), s)));
        return value;
    }
    const v16 c = set1(0.7978845608028654f), k = set1(0.044715f);
    v16 x2 = _mm512_mul_ps(x, x);
    v16 inner = _mm512_mul_ps(_mm512_mul_ps(c, x), _mm512_fmadd_ps(k, x2, set1(1.0f)));
    v16 t = tanh16(inner);
    v16 half = _mm512_fmadd_ps(set1(0.5f), t, set1(0.5f));
    v16 d_inner = _mm512_mul_ps(c, _mm512_fmadd_ps(set1(3 * 0.044715f), x2, set1(1.0f)));
    v16 sech2 = _mm512_fnmadd_ps(t, t, set1(1.0f));
    *slope = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(set1(0.5f), x), sech2), d_inner, half);
    return _mm512_mul_ps(x, half);
}

// 16 of product = activation(gate) · up.
INLINE void gate16(const bf16 *gate, const bf16 *up, bf16 *product, int kind, __mmask16 m) {
    v16 slope, a = activate(load_bf16(gate, m), kind, &slope);
    store_bf16(product, _mm512_mul_ps(a, load_bf16(up, m)), m);
}

// 16 of d_gate and d_up from d, the gradient of the product, and the product itself again.
INLINE void derive16(v16 d, const bf16 *gate, const bf16 *up, bf16 *d_gate, bf16 *d_up, bf16 *product, int kind, __mmask16 m) {
    v16 u = load_bf16(up, m), slope, a = activate(load_bf16(gate, m), kind, &slope);
    store_bf16(d_gate, _mm512_mul_ps(_mm512_mul_ps(d, u), slope), m);
    store_bf16(d_up, _mm512_mul_ps(d, a), m);
    store_bf16(product, _mm512_mul_ps(a, u), m);
}

// product = activation(gate) · up; gate and up [T, F] share a row stride, the product is contiguous.
void gated_forward(const bf16 *gate, const bf16 *up, long stride, bf16 *product, int kind, long T, long F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        for (long i = 0; i < F; i += 16)
            gate16(gate + t * stride + i, up + t * stride + i, product + t * F + i, kind, tail(F - i));
    }
}

// d_gate, d_up [T, F] (row stride `d_stride`) from d_product, and the product itself again.
void gated_backward(const bf16 *d_product, const bf16 *gate, const bf16 *up, long stride, bf16 *d_gate, bf16 *d_up,
                    long d_stride, bf16 *product, int kind, long T, long F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        for (long i = 0; i < F; i += 16) {
            __mmask16 m = tail(F - i);
            derive16(load_bf16(d_product + t * F + i, m), gate + t * stride + i, up + t * stride + i,
                     d_gate + t * d_stride + i, d_up + t * d_stride + i, product + t * F + i, kind, m);
        }
    }
}

// ---------------------------------------------------------------- cross-entropy

// Loss of each row of logits [N, V], and (if `gradient`) the logits replaced by the loss's gradient.
// softcap > 0: logits become softcap · tanh(logits / softcap) first. smoothing: label smoothing.
void cross_entropy(bf16 *logits, const int64_t *targets, double *losses, float softcap, float smoothing, int gradient,
                   long N, long V, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        bf16 *row = logits + n * V;
        const v16 cap = set1(softcap), inverse_cap = set1(softcap > 0 ? 1 / softcap : 0);
        v16 top = set1(-INFINITY);
        for (long i = 0; i < V; i += 16) {
            __mmask16 m = tail(V - i);
            top = _mm512_mask_max_ps(top, m, top, load_bf16(row + i, m));
        }
        float highest = _mm512_reduce_max_ps(top);
        if (softcap > 0) highest = softcap * tanhf(highest / softcap);
        // Sums of up to 1024 terms in fp32, those in double: the loss keeps its digits for any vocabulary.
        double total = 0, plain = 0;
        for (long begin = 0; begin < V; begin += 16384) {
            long end = begin + 16384 < V ? begin + 16384 : V;
            v16 sum = _mm512_setzero_ps(), values = _mm512_setzero_ps();
            for (long i = begin; i < end; i += 16) {
                __mmask16 m = tail(V - i);
                v16 x = load_bf16(row + i, m);
                if (softcap > 0) x = _mm512_mul_ps(cap, tanh16(_mm512_mul_ps(x, inverse_cap)));
                sum = _mm512_mask_add_ps(sum, m, sum, exp16(_mm512_sub_ps(x, set1(highest))));
                values = _mm512_mask_add_ps(values, m, values, x);
            }
            total += _mm512_reduce_add_ps(sum);
            plain += _mm512_reduce_add_ps(values);
        }
        double normaliser = highest + log(total);
        union { uint32_t u; float f; } picked = {(uint32_t)row[targets[n]] << 16};
        if (softcap > 0) picked.f = softcap * tanhf(picked.f / softcap);
        losses[n] = normaliser - (1 - smoothing) * (double)picked.f - smoothing * plain / (double)V;
        if (!gradient) continue;
        const v16 shift = set1((float)normaliser), even = set1(smoothing / (float)V);
        for (long i = 0; i < V; i += 16) {
            __mmask16 m = tail(V - i);
            v16 x = load_bf16(row + i, m), slope = set1(1.0f);
            if (softcap > 0) {
                v16 t = tanh16(_mm512_mul_ps(x, inverse_cap));
                slope = _mm512_fnmadd_ps(t, t, slope);
                x = _mm512_mul_ps(cap, t);
            }
            v16 g = _mm512_sub_ps(exp16(_mm512_sub_ps(x, shift)), even);
            long offset = targets[n] - i;
            if (offset >= 0 && offset < 16) g = _mm512_mask_sub_ps(g, 1u << offset, g, set1(1 - smoothing));
            store_bf16(row + i, _mm512_mul_ps(g, slope), m);
        }
    }
}

// ---------------------------------------------------------------- rotary embedding

// Rotate the first 2·half of every head of q and k in place, `sign` −1 turns back; all of q is multiplied by `scale`.
// cosine and sine: [T, half] in fp32.
INLINE void rotate_heads(bf16 *x, long heads, long d, const float *cosine, const float *sine, long half, float sign, float scale) {
    for (long h = 0; h < heads; h++, x += d) {
        for (long i = 0; i < half; i += 16) {
            __mmask16 m = tail(half - i);
            v16 a = load_bf16(x + i, m), b = load_bf16(x + half + i, m);
            v16 c = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, cosine + i), set1(scale));
            v16 s = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, sine + i), set1(scale * sign));
            store_bf16(x + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), m);
            store_bf16(x + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), m);
        }
        for (long i = 2 * half; scale != 1.0f && i < d; i += 16) {
            __mmask16 m = tail(d - i);
            store_bf16(x + i, _mm512_mul_ps(load_bf16(x + i, m), set1(scale)), m);
        }
    }
}

void rotate(bf16 *q, long q_stride, long q_heads, bf16 *k, long k_stride, long k_heads, long d, const float *cosine,
            const float *sine, long half, float sign, float scale, long T, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        rotate_heads(q + t * q_stride, q_heads, d, cosine + t * half, sine + t * half, half, sign, scale);
        rotate_heads(k + t * k_stride, k_heads, d, cosine + t * half, sine + t * half, half, sign, 1.0f);
    }
}
