"""Methods that let many weights share one value."""

from jcompress.share.circulant import Circulant
from jcompress.share.columns import zipped
from jcompress.share.hashed import Hashed, HashedFrequencies
from jcompress.share.kmeans import KMeans
from jcompress.share.mixture import ByMixture, Mixture
from jcompress.share.rows import TiedRows
from jcompress.share.soft import SoftKMeans
from jcompress.share.templates import Templates
from jcompress.share.toeplitz import Toeplitz
from jcompress.share.transforms import ACDC, Fastfood

__all__ = [
    "ACDC",
    "ByMixture",
    "Circulant",
    "Fastfood",
    "Hashed",
    "HashedFrequencies",
    "KMeans",
    "Mixture",
    "SoftKMeans",
    "Templates",
    "TiedRows",
    "Toeplitz",
    "zipped",
]
