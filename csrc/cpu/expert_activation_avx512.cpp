#define MOE_ROUTE_ISA avx512
#include "expert_activation_impl.h"
