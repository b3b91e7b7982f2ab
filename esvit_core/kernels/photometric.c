/* Color jitter, grayscale, Gaussian blur, solarization and normalization of a crop, (3, size, size) float32 in place.
 *
 * The same operations, in the same order, as esvit_core/data/loading/photometric.py, which explains them. Each pass handles
 * a pixel, or a line, at once, so that intermediate values stay in registers and in the first-level cache. */

#include "image_ops.h"

/* numpy rounds each operation: a product and a sum may not be contracted to one operation. */
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE };
#define PASSES 3
#define STRIP 32   /* columns that are blurred together */
#define CHUNK 1024 /* values that stay in the first-level cache */

static inline float clip(float x, float low, float high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* The luma as numpy's matrix product computes it: with fused sums. */
static inline float luma(float red, float green, float blue)
{
    return fmaf(blue, 7471.0f / 65536, fmaf(green, 38470.0f / 65536, red * (19595.0f / 65536)));
}

/* The sum of n values in numpy's order. */
static float pairwise_sum(const float *x, int64_t n)
{
    if (n > 128) {
        int64_t half = n / 2 - n / 2 % 8;
        return pairwise_sum(x, half) + pairwise_sum(x + half, n - half);
    }
    float total = 0;
    int64_t i = 0;
    if (n >= 8) {
        float part[8];
        for (int j = 0; j < 8; j++)
            part[j] = x[j];
        for (i = 8; i < n - n % 8; i += 8)
            for (int j = 0; j < 8; j++)
                part[j] += x[i + j];
        total = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
    }
    for (; i < n; i++)
        total += x[i];
    return total;
}

/* x = x * factor + shift; clipped if the factor is greater than 1. */
static void scale(float *x, int64_t n, float factor, float shift)
{
    if (factor > 1) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            x[i] = clip(x[i] * factor + shift, 0, 255);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            x[i] = x[i] * factor + shift;
    }
}

static void adjust_contrast(float *x, int64_t n, float factor, double rest, float *gray)
{
    const float *red = x, *green = x + n, *blue = x + 2 * n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        gray[i] = luma(red[i], green[i], blue[i]);
    int64_t mean = (int64_t)((double)(pairwise_sum(gray, n) / n) + 0.5);
    scale(x, 3 * n, factor, (float)(rest * mean));
}

static void adjust_saturation(float *x, int64_t n, float factor, float rest)
{
    float *red = x, *green = x + n, *blue = x + 2 * n;
    float high = factor > 1 ? 255 : INFINITY, low = factor > 1 ? 0 : -INFINITY;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float gray = luma(red[i], green[i], blue[i]) * rest;
        red[i] = clip(red[i] * factor + gray, low, high);
        green[i] = clip(green[i] * factor + gray, low, high);
        blue[i] = clip(blue[i] * factor + gray, low, high);
    }
}

/* start[3]: what is added to the hue, in sixths, where red, green, or blue is the largest channel. */
static void adjust_hue(float *x, int64_t n, const float *start)
{
    float *reds = x, *greens = x + n, *blues = x + 2 * n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float red = reds[i], green = greens[i], blue = blues[i];
        float greatest = red > green ? red : green, least = red < green ? red : green;
        greatest = greatest > blue ? greatest : blue;
        least = least < blue ? least : blue;
        float chroma = greatest - least, per_chroma = 1.0f / (chroma > 1e-6f ? chroma : 1e-6f);
        float of_red = (green - blue) * per_chroma + start[0];
        float of_green = (blue - red) * per_chroma + start[1];
        float of_blue = (red - green) * per_chroma + start[2];
        float hue = greatest == red ? of_red : greatest == green ? of_green : of_blue;
        hue -= floorf(hue * (1.0f / 6)) * 6.0f;
        reds[i] = clip(fabsf(hue - 3) - 1, 0, 1) * chroma + least;
        greens[i] = clip(2 - fabsf(hue - 2), 0, 1) * chroma + least;
        blues[i] = clip(2 - fabsf(hue - 4), 0, 1) * chroma + least;
    }
}

static void make_gray(float *x, int64_t n)
{
    float *red = x, *green = x + n, *blue = x + 2 * n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        red[i] = green[i] = blue[i] = luma(red[i], green[i], blue[i]);
}

/* A box blur without its weight: each of n values plus its neighbors up to `reach` steps of `distance` away, and `ratio`
 * times those one step further. */
static inline void add_neighbors(const float *restrict in, float *restrict out, int64_t n, int64_t distance, int64_t reach,
                                 float ratio)
{
    const float *before = in - (reach + 1) * distance, *after = in + (reach + 1) * distance;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        out[i] = (before[i] + after[i]) * ratio;
    for (int64_t step = 1; step <= reach; step++) {
        before = in - step * distance, after = in + step * distance;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            out[i] = out[i] + before[i] + after[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        out[i] = in[i] + out[i];
}

/* The same with a reach of 1 at most, as for every sigma up to 2.4, in one pass. */
static inline void add_near_neighbors(const float *restrict in, float *restrict out, int64_t n, int64_t distance,
                                      int64_t reach, float ratio)
{
    const float *b1 = in - distance, *a1 = in + distance, *b2 = b1 - distance, *a2 = a1 + distance;
    if (reach) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            out[i] = in[i] + ((b2[i] + a2[i]) * ratio + b1[i] + a1[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            out[i] = in[i] + (b1[i] + a1[i]) * ratio;
    }
}

/* Repeat the first and the last of `size` lines of `width` values `margin` times beyond them. */
static inline void repeat_borders(float *lines, int64_t size, int64_t width, int64_t margin)
{
    float *last = lines + (size - 1) * width;
    for (int64_t line = 1; line <= margin; line++)
        for (int64_t i = 0; i < width; i++) {
            lines[i - line * width] = lines[i];
            last[i + line * width] = last[i];
        }
}

/* Three box blurs along `size` lines of `width` values. Both buffers have room for reach + 1 lines at either end; the result
 * is in `spare`. */
static inline void blur_lines(float *lines, float *spare, int64_t size, int64_t width, int64_t reach, float ratio)
{
    for (int pass = 0; pass < PASSES; pass++) {
        float *in = pass % 2 ? spare : lines, *out = pass % 2 ? lines : spare;
        repeat_borders(in, size, width, reach + 1);
        for (int64_t i = 0; i < size * width; i += CHUNK) {
            int64_t n = size * width - i < CHUNK ? size * width - i : CHUNK;
            (reach > 1 ? add_neighbors : add_near_neighbors)(in + i, out + i, n, width, reach, ratio);
        }
    }
}

/* Gaussian blur of one channel: along the rows, then along the columns. The scratch holds 2 STRIP (size + 2 reach + 2). */
static void blur_channel(float *x, int64_t size, int64_t reach, float ratio, float weight, float *scratch)
{
    float *lines = scratch + STRIP * (reach + 1), *spare = lines + STRIP * (size + 2 * reach + 2);
    for (int64_t y = 0; y < size; y++) {
        memcpy(lines, x + y * size, size * sizeof *x);
        blur_lines(lines, spare, size, 1, reach, ratio);
        memcpy(x + y * size, spare, size * sizeof *x);
    }
    for (int64_t left = 0; left < size; left += STRIP) {
        int64_t width = size - left < STRIP ? size - left : STRIP;
        for (int64_t y = 0; y < size; y++)
            memcpy(lines + y * width, x + y * size + left, width * sizeof *x);
        blur_lines(lines, spare, size, width, reach, ratio);
        for (int64_t y = 0; y < size; y++)
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                x[y * size + left + i] = spare[y * width + i] * weight;
    }
}

static void solarize(float *x, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] >= 128 ? x[i] - (2 * x[i] - 255) : x[i];
}

/* All photometric operations of a crop, in place on its values 0 to 255, and its normalization: * scales + shifts, of the
 * three channels. Returns 0, or 1 if out of memory. */
int augment_colors(const struct crop *crop, const float *scales, const float *shifts)
{
    int64_t size = crop->size, n = size * size, room = 2 * STRIP * (size + 2 * crop->blur_reach + 2);
    float *x = crop->out, *scratch = malloc((room > n ? room : n) * sizeof *scratch);
    if (!scratch)
        return 1;
    for (int i = 0; i < 4; i++) {
        float factor = crop->factors[i], rest = (float)crop->rests[i];
        switch (crop->operations[i]) {
        case BRIGHTNESS:
            scale(x, 3 * n, factor, 0);
            break;
        case CONTRAST:
            adjust_contrast(x, n, factor, crop->rests[i], scratch);
            break;
        case SATURATION:
            adjust_saturation(x, n, factor, rest);
            break;
        case HUE:
            adjust_hue(x, n, crop->hues);
        }
    }
    if (crop->grayscale)
        make_gray(x, n);
    if (crop->blur)
        for (int c = 0; c < 3; c++)
            blur_channel(x + c * n, size, crop->blur_reach, crop->blur_ratio, crop->blur_weight, scratch);
    if (crop->solarize)
        solarize(x, 3 * n);
    for (int c = 0; c < 3; c++) {
        float scale = scales[c], shift = shifts[c];
#pragma omp simd
        for (int64_t i = c * n; i < (c + 1) * n; i++)
            x[i] = x[i] * scale + shift;
    }
    free(scratch);
    return 0;
}
