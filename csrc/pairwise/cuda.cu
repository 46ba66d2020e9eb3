#include "core/launch.cuh"
#include "pairwise/kernels.h"
