// The body of each capability_<name>.cpp: all kernels, compiled for one instruction set in a namespace of its own, so
// that no function of one set can be linked in place of another's. The file that includes it defines BNFAST_NAMESPACE,
// BNFAST_VECTOR_BYTES and the target pragma, and includes the standard headers before that pragma.
#include "bn_kernels.h"
#include "conv_grouped_kernels.h"
#include "conv_pointwise_kernels.h"
#include "conv_winograd_kernels.h"
#include "max_pool_kernels.h"

namespace bnfast::BNFAST_NAMESPACE {

extern const Capability capability;
const Capability capability = {
    BNFAST_STRINGIFY(BNFAST_NAMESPACE),
    {bn_kernels<float>(), bn_kernels<double>(), bn_kernels<bf16>(), bn_kernels<f16>()},
    {grouped_kernels<float>(), grouped_kernels<double>(), grouped_kernels<bf16>(), grouped_kernels<f16>()},
    {max_pool_kernels<float>(), max_pool_kernels<double>(), max_pool_kernels<bf16>(), max_pool_kernels<f16>()},
    {winograd_kernels<float>(), winograd_kernels<double>(), winograd_kernels<bf16>(), winograd_kernels<f16>()},
    pointwise_kernels(),
    {},
};

}  // namespace bnfast::BNFAST_NAMESPACE
