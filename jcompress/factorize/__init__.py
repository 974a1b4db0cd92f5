"""Matrix and tensor factorizations."""

from jcompress.factorize.spectrum import Spectrum
from jcompress.factorize.svd import SVD

__all__ = ["SVD", "Spectrum"]
