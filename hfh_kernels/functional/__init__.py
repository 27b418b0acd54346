"""The public functions. Shapes and dtypes are checked by the operator or reference that runs."""

from hfh_kernels.functional.convolution import conv1d, conv2d
from hfh_kernels.functional.lookup import embedding, embedding_bag
from hfh_kernels.functional.matmul import linear
from hfh_kernels.functional.reconstruction import hash_index, materialize

__all__ = [
    "conv1d",
    "conv2d",
    "embedding",
    "embedding_bag",
    "hash_index",
    "linear",
    "materialize",
]
