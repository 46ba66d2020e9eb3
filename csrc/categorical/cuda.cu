#include "categorical/kernels.h"
#include "core/launch.cuh"
