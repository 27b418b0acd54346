"""The operators ``torch.ops.hfh.*``, one folder each; importing this package defines them all."""

from hfh_kernels.ops.conv2d import op as conv2d
from hfh_kernels.ops.embedding import op as embedding
from hfh_kernels.ops.embedding_bag import op as embedding_bag
from hfh_kernels.ops.hash_index import op as hash_index
from hfh_kernels.ops.linear import op as linear
from hfh_kernels.ops.materialize import op as materialize

__all__ = ["conv2d", "embedding", "embedding_bag", "hash_index", "linear", "materialize"]
