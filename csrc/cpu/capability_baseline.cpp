#include "capability_prelude.h"

#define BNFAST_NAMESPACE baseline
#define BNFAST_VECTOR_BYTES 16
#include "capability_body.h"
