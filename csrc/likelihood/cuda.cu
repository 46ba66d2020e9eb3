#include "core/launch.cuh"
#include "likelihood/kernels.h"
