# SPDX-License-Identifier: Apache-2.0
"""What a request has used, in OpenAI's form."""

from typing import Any

from moepeft.serve.http.request_stats import Tally


def usage(tally: Tally) -> dict[str, Any]:
  return {
    'prompt_tokens': tally.prompt,
    'completion_tokens': tally.answer,
    'total_tokens': tally.prompt + tally.answer,
    'prompt_tokens_details': {
      # Answers to one prompt share it.
      'cached_tokens': min(tally.cached, tally.prompt)
    },
  }
