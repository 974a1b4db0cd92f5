"""Matrix and tensor factorizations."""

from jcompress.factorize.adapters import adapter
from jcompress.factorize.cp import CP
from jcompress.factorize.initial import spectral_init
from jcompress.factorize.lcc import LCC
from jcompress.factorize.nonnegative import NMF
from jcompress.factorize.predicted import Predicted
from jcompress.factorize.products import Kronecker, Monarch
from jcompress.factorize.rank_choice import evbmf
from jcompress.factorize.separable import Separable
from jcompress.factorize.spectrum import Spectrum
from jcompress.factorize.svd import SVD
from jcompress.factorize.ternary import TernarySVD, additions
from jcompress.factorize.trains import TensorRing, TensorTrain
from jcompress.factorize.tucker import BlockTerm, Tucker
from jcompress.factorize.weighted import FisherSVD, PrincipalComponents, Whitened, WhitenedSVD

__all__ = [
    "CP",
    "LCC",
    "NMF",
    "SVD",
    "BlockTerm",
    "FisherSVD",
    "Kronecker",
    "Monarch",
    "Predicted",
    "PrincipalComponents",
    "Separable",
    "Spectrum",
    "TensorRing",
    "TensorTrain",
    "TernarySVD",
    "Tucker",
    "Whitened",
    "WhitenedSVD",
    "adapter",
    "additions",
    "evbmf",
    "spectral_init",
]
