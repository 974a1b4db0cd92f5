"""Methods that let many weights share one value."""

from jcompress.share.circulant import Circulant
from jcompress.share.hashed import Hashed, HashedFrequencies
from jcompress.share.kmeans import KMeans
from jcompress.share.toeplitz import Toeplitz
from jcompress.share.transforms import ACDC, Fastfood

__all__ = ["ACDC", "Circulant", "Fastfood", "Hashed", "HashedFrequencies", "KMeans", "Toeplitz"]
