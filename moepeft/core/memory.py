# SPDX-License-Identifier: Apache-2.0
"""Errors that say that memory ran out, of the host or of a device."""

import errno

# As XLA says it. TensorStore gives a full disk the same code.
_WORDS = ('Out of memory', 'out of memory', 'Failed to allocate')
_CODE = 'RESOURCE_EXHAUSTED'
_DISK = 'No space left on device'


def is_out_of_memory(error: BaseException) -> bool:
  """Whether an error says that memory of the host or a device ran out."""
  if isinstance(error, MemoryError):
    return True
  if isinstance(error, OSError) and error.errno == errno.ENOMEM:
    return True
  text = str(error)
  if _DISK in text:
    return False
  return _CODE in text or any(word in text for word in _WORDS)
