// How vectors are compared with codes: by -|x - c|², by the cosine of the angle between them or by x·c.
#pragma once

namespace isthmus {

enum class Metric { euclidean, cosine, inner_product };

}  // namespace isthmus
