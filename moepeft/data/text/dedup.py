# SPDX-License-Identifier: Apache-2.0
"""Texts that are almost the same as one before (Broder, 1997).

MinHash proposes pairs, of which `datasketch` (the extra `moepeft[data]`) keeps
the index; the sets themselves decide. Near the threshold a few pairs are not
proposed: it errs towards keeping.
"""

from collections.abc import Sequence

# Words in a row that a text is taken apart into.
_WORDS = 5
_PERMUTATIONS = 128
_SEED = 1


def shingles(text: str) -> set[str]:
  """Every five words in a row, in lower case; a shorter text is one."""
  words = text.lower().split()
  last = max(len(words) - _WORDS, 0)
  return {' '.join(words[i : i + _WORDS]) for i in range(last + 1)}


def jaccard(first: set[str], second: set[str]) -> float:
  """Shared over all."""
  return len(first & second) / max(len(first | second), 1)


def near_duplicates(texts: Sequence[str], least: float) -> list[bool]:
  """Whether each text is a near duplicate of one before it that was kept.

  Args:
    least: the Jaccard similarity of shingles from which on they are.

  Raises:
    ValueError: `least` is no similarity, or datasketch is not installed.
  """
  if not 0 < least <= 1:
    raise ValueError(
      'config.data.dedup_threshold is a Jaccard similarity above 0 and up to 1 '
      '(0 '
      f'for none); got {least}'
    )
  try:
    # Imported here: it is an extra.
    import datasketch
  except ImportError:
    raise ValueError(
      'config.data.dedup_threshold needs datasketch; pip install '
      "'moepeft[data]', "
      'or set it to 0'
    ) from None
  # Proposals reach lower than what is asked for, so that few are missed.
  reach = min(0.9 * least, 0.9)
  index = datasketch.MinHashLSH(threshold=reach, num_perm=_PERMUTATIONS)
  is_duplicate = []
  for i, text in enumerate(texts):
    text_shingles = shingles(text)
    signature = datasketch.MinHash(num_perm=_PERMUTATIONS, seed=_SEED)
    signature.update_batch(
      [shingle.encode() for shingle in sorted(text_shingles)]
    )
    same = any(
      jaccard(text_shingles, shingles(texts[j])) >= least
      for j in index.query(signature)
    )
    is_duplicate.append(same)
    if not same:
      index.insert(i, signature)
  return is_duplicate
