/* The loops of one number type T on vectors of LANES numbers. Included by types.h once per type and instruction set;
 * FN(name) gives each copy a name of its own. */

#define LANES (BYTES / (int)sizeof(T))
#include "convert.h"
#include "gradients.h"
#include "factors.h"
#include "sums.h"
#undef LANES
#undef VEC
#undef KEEP
#undef QUAD
#undef SHUFFLE
#undef SINGLES_BF16
#undef SINGLES_F16
#undef HALF_BF16
#undef HALF_F16
#undef FOUR_BF16
#undef FOUR_F16
#undef LOAD_F64
#undef LOAD_F32
#undef LOAD_BF16
#undef LOAD_F16
#undef QUAD_F64
#undef QUAD_F32
#undef QUAD_BF16
#undef QUAD_F16
#undef ADD_WIDE
