/* Both number types for one instruction set, whose vectors hold BYTES bytes and are REGISTERS in number. */

#define TYPE double
#define T double
#define INDEX int64_t
#include "loops.h"
#undef TYPE
#undef T
#undef INDEX
#define TYPE float
#define T float
#define INDEX int32_t
#include "loops.h"
#undef TYPE
#undef T
#undef INDEX
