/* Both number types for one instruction set, whose vectors hold BYTES bytes and are REGISTERS in number. */

#define TYPE double
#define T double
#define DOUBLE 1
#define INDEX int64_t
#include "loops.h"
#undef TYPE
#undef T
#undef DOUBLE
#undef INDEX
#define TYPE float
#define T float
#define DOUBLE 0
#define INDEX int32_t
#include "loops.h"
#undef TYPE
#undef T
#undef DOUBLE
#undef INDEX
