/* Both number types for one instruction set, whose vectors hold BYTES bytes. */

#define TYPE double
#define T double
#define LANES (BYTES / 8)
#include "loops.h"
#undef TYPE
#undef T
#undef LANES
#define TYPE float
#define T float
#define LANES (BYTES / 4)
#include "loops.h"
#undef TYPE
#undef T
#undef LANES
