"""Pairs of sentences with human scores of their similarity, and how well an encoder agrees with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.models import minilm

PyTree = Any
Tokens = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of sentences as tokens.

    Attributes:
      first: tokens of the first sentence of each pair.
      second: tokens of the second.
      scores: similarity from 0 to 5, float64, or NaN where nobody judged.
    """

    first: list[list[int]]
    second: list[list[int]]
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def where(self, keep: np.ndarray) -> Pairs:
        """Some of the pairs."""
        index = np.flatnonzero(keep)
        return Pairs([self.first[i] for i in index], [self.second[i] for i in index], self.scores[index])


def read(path: str | Path, encoder: minilm.Encoder) -> Pairs:
    """Pairs from a file of lines ``score <tab> sentence <tab> sentence``; a line without a score is unlabelled.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a line of another form.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; --data_dir must be a folder with the pairs of SemEval 2015 task 2, a file for each "
            "set, lines 'score <tab> sentence <tab> sentence' (https://alt.qcri.org/semeval2015/task2)"
        )
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    for i, row in enumerate(rows, 1):
        if len(row) != 3:
            raise ValueError(f"{path}: line {i} has {len(row)} columns, expected a score and two sentences")
    scores = np.array([float(score) if score.strip() else np.nan for score, _, _ in rows])
    return Pairs(encoder.tokens([a for _, a, _ in rows]), encoder.tokens([b for _, _, b in rows]), scores)


def batches(tokens: Tokens, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Which sentences, their padded tokens and their mask: sentences of like length together, the last batch filled up.

    A shape is ``(size, length)`` with a length of ``minilm.LENGTHS``, so that a handful of shapes are compiled.
    """
    order = np.argsort([len(x) for x in tokens], kind="stable")
    longest = [next(n for n in minilm.LENGTHS if n >= len(tokens[i])) for i in order]
    for length in sorted(set(longest)):
        members = order[[n == length for n in longest]]
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            filled = [tokens[i] for i in chosen] + [tokens[chosen[-1]]] * (size - len(chosen))
            yield chosen, *minilm.pad(filled, length)


class Judge:
    """Embeds and scores; compiled once for all parameters.

    Args:
      encoder: ``encoder(params, tokens, mask)``.
      size: sentences a batch.
    """

    def __init__(self, encoder: Callable[..., jax.Array], size: int = 64) -> None:
        self._encode, self._size = jax.jit(encoder), size

    def embed(self, params: PyTree, tokens: Tokens) -> np.ndarray:
        """Embeddings, float32 (sentences, width)."""
        found: np.ndarray | None = None
        for chosen, padded, mask in batches(tokens, self._size):
            rows = np.asarray(self._encode(params, padded, mask))[: len(chosen)]
            found = np.zeros((len(tokens), rows.shape[1]), np.float32) if found is None else found
            found[chosen] = rows
        assert found is not None
        return found

    def pairs(self, params: PyTree, pairs: Pairs) -> np.ndarray:
        """Embeddings of both sentences of each pair, float32 (pairs, 2, width)."""
        both = self.embed(params, [*pairs.first, *pairs.second])
        return np.stack([both[: len(pairs)], both[len(pairs) :]], axis=1)


def similarity(embeddings: np.ndarray) -> np.ndarray:
    """The cosine of both sentences of each pair, from embeddings (pairs, 2, width) of unit length."""
    return np.einsum("pd,pd->p", embeddings[:, 0], embeddings[:, 1])


def spearman(embeddings: np.ndarray, scores: np.ndarray) -> float:
    """Rank correlation of the cosines of pairs with scores."""
    from scipy.stats import spearmanr

    return float(spearmanr(similarity(embeddings), scores).statistic)


def agreement(embeddings: np.ndarray, dense: np.ndarray) -> dict[str, float]:
    """How near embeddings (pairs, 2, width) are to those of the dense encoder; no human score is read.

    Returns:
      ``cosine``, the mean cosine of an embedding with its dense one; ``similarity_error``, the root of the mean squared
      difference of the similarity of pairs; and ``rank``, the rank correlation of the two similarities.
    """
    error = similarity(embeddings) - similarity(dense)
    return {
        "cosine": float(np.einsum("psd,psd->ps", embeddings, dense).mean()),
        "similarity_error": float(np.sqrt(np.square(error).mean())),
        "rank": spearman(embeddings, similarity(dense)),
    }


def labelled(sets: Mapping[str, Pairs]) -> dict[str, Pairs]:
    """The judged pairs of each set."""
    return {name: pairs.where(~np.isnan(pairs.scores)) for name, pairs in sets.items()}


def unlabelled(sets: Mapping[str, Pairs]) -> Pairs:
    """The pairs of all sets that nobody judged."""
    parts = [pairs.where(np.isnan(pairs.scores)) for pairs in sets.values()]
    return Pairs(
        [x for p in parts for x in p.first],
        [x for p in parts for x in p.second],
        np.concatenate([p.scores for p in parts]),
    )
