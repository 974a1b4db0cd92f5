"""Methods that let many weights share one value."""

from jcompress.share.kmeans import KMeans

__all__ = ["KMeans"]
