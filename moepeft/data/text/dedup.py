# SPDX-License-Identifier: Apache-2.0
"""Near-duplicate texts, by MinHash (Broder, 1997).

The LSH index of `datasketch` (the extra `moepeft[data]`) proposes pairs, and
the Jaccard similarity of their shingles decides. The index misses a few pairs
near the threshold, whose texts then stay.
"""

from collections.abc import Sequence

# Words in a shingle.
_WORDS = 5
_PERMUTATIONS = 128
_SEED = 1


def shingles(text: str) -> set[str]:
  """Each run of five words, in lower case; a shorter text is one shingle."""
  words = text.lower().split()
  last = max(len(words) - _WORDS, 0)
  return {' '.join(words[i : i + _WORDS]) for i in range(last + 1)}


def jaccard(first: set[str], second: set[str]) -> float:
  """The size of the intersection over that of the union."""
  return len(first & second) / max(len(first | second), 1)


def near_duplicates(texts: Sequence[str], threshold: float) -> list[bool]:
  """Whether each text is a near duplicate of an earlier text that stays.

  Args:
    threshold: the least Jaccard similarity of two near duplicates' shingles.

  Raises:
    ValueError: `threshold` is no similarity, or datasketch is not installed.
  """
  if not 0 < threshold <= 1:
    raise ValueError(
      'config.data.dedup_threshold is a Jaccard similarity above 0 and up to 1 '
      f'(0 for none); got {threshold}'
    )
  try:
    # Imported here: it is an extra.
    import datasketch
  except ImportError:
    raise ValueError(
      'config.data.dedup_threshold needs datasketch; pip install '
      "'moepeft[data]', or set it to 0"
    ) from None
  # A lower threshold than the user's, so that the index misses few pairs.
  lsh_threshold = min(0.9 * threshold, 0.9)
  index = datasketch.MinHashLSH(lsh_threshold, num_perm=_PERMUTATIONS)
  is_duplicate = []
  for i, text in enumerate(texts):
    text_shingles = shingles(text)
    signature = datasketch.MinHash(num_perm=_PERMUTATIONS, seed=_SEED)
    signature.update_batch(
      [shingle.encode() for shingle in sorted(text_shingles)]
    )
    is_duplicate.append(
      any(
        jaccard(text_shingles, shingles(texts[j])) >= threshold
        for j in index.query(signature)
      )
    )
    if not is_duplicate[-1]:
      index.insert(i, signature)
  return is_duplicate
