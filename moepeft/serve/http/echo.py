# SPDX-License-Identifier: Apache-2.0
"""A prompt that is given back before its answer, with its tokens' places."""

from collections.abc import Sequence

from moepeft.inference.api import Scored
from moepeft.inference.detokenizer import Detokenizer
from moepeft.serve.http.completion_stream import Entry
from moepeft.serve.http.text import Words


def echoed(
  words: Words,
  ids: Sequence[int],
  given: str | None,
  scored: Sequence[Scored],
) -> tuple[str, list[Entry]]:
  """(the prompt's text, its tokens).

  Args:
    given: the prompt where it was text, which is given back as it was.
    scored: its tokens; () where they were not asked for.
  """
  if not scored:
    return (words.decode(ids) if given is None else given), []
  detokenizer, offsets, text = Detokenizer(words.decode), [], ''
  for i in ids:
    offsets.append(len(text))
    text += detokenizer.feed([i])
  text += detokenizer.finish()
  text = text if given is None else given
  # A tokenizer may write a text a little otherwise than it was.
  pairs = zip(scored, offsets, strict=True)
  return text, [Entry(one, min(at, len(text))) for one, at in pairs]
