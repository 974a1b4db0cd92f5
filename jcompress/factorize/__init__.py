"""Matrix and tensor factorizations."""

from jcompress.factorize.svd import SVD

__all__ = ["SVD"]
