/* Window attention for heads of width 32. */

#define HEAD 32
#define attend attend_32
#define attend_backward attend_backward_32
#include "window_attention.h"
