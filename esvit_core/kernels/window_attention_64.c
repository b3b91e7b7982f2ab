/* Window attention for heads of width 64. */

#define HEAD 64
#define attend attend_64
#define attend_backward attend_backward_64
#include "window_attention.h"
