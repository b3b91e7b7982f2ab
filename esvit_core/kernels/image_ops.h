/* What image_ops.py passes to crop_resize.c and photometric.c. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct crop {
    int64_t left, top, width, height; /* box in the image, pixels */
    int64_t size;                     /* side of the crop */
    int64_t flip;                     /* mirror it */
    int64_t operations[4];            /* of the color jitter, in order: 0 brightness, 1 contrast, 2 saturation, 3 hue, -1 none */
    double rests[4];                  /* 1 - factor, of each operation */
    float factors[4];                 /* of each operation; without meaning for hue */
    float hues[3];                    /* the shift of the hue and the hues of the three channels, in sixths */
    float blur_ratio, blur_weight;    /* see gaussian_blur in photometric.py */
    int64_t blur, blur_reach;
    int64_t grayscale, solarize;
    float *out; /* (3, size, size) */
};

int augment_colors(const struct crop *crop, const float *scales, const float *shifts);
