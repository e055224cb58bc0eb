# SPDX-License-Identifier: Apache-2.0
"""P-tuning (Liu et al., arXiv:2103.10385): a soft prompt that an MLP computes.

The MLP has two hidden layers, as in Hugging Face's peft, and the vectors stand
before the text; the paper has a bidirectional LSTM before an MLP of two layers,
and templates with vectors in several places. The MLP is for training alone: an
export is the `prompt` of the vectors that result.
"""

from typing import Any

import flax.linen as nn

from moepeft.config.method_string import Spec
from moepeft.core.ranges import Range, option
from moepeft.core.types import Array
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import Normal, kaiming_uniform, peft_param
from moepeft.peft.method import Method
from moepeft.peft.methods import prompt_tuning
from moepeft.peft.methods.prompt_tuning import Prompt


class PTuning(Prompt):
  """Vectors relu(relu(E W0 + b0) W1 + b1) W2 + b2 for placeholders.

  Parameters: embedding E [r, d] ~ N(0, 1), kernel_0 [d, m], bias_0 [m],
  kernel_1 [m, m], bias_1 [m], kernel_2 [m, d], bias_2 [d], float32.

  Attributes:
    length: r, tokens of the prompt.
    hidden: m.
  """

  hidden: int = option(128, Range(1, 65_536))

  @nn.nowrap
  def vectors(self, f: BaseLayer) -> Array:
    d, m = f.shape[1], self.hidden
    # torch.nn.Embedding's and torch.nn.Linear's initializers.
    arrays = {
      'embedding': peft_param(
        self, 'embedding', Normal(1), (self.length, d), 'rd'
      )
    }
    for i, (inputs, outputs) in enumerate(((d, m), (m, m), (m, d))):
      init = kaiming_uniform(inputs)
      axes = ('dr', 'rr', 'rd')[i]
      kernel, bias = f'kernel_{i}', f'bias_{i}'
      arrays[kernel] = peft_param(self, kernel, init, (inputs, outputs), axes)
      arrays[bias] = peft_param(self, bias, init, (outputs,), axes[1])
    return _vectors(arrays)


def _vectors(arrays: dict[str, Any]) -> Any:
  z = arrays['embedding']
  for i in range(3):
    z = z @ arrays[f'kernel_{i}'] + arrays[f'bias_{i}']
    z = z * (z > 0) if i < 2 else z
  return z


def fold(spec: Spec, arrays: dict[str, Any]) -> tuple[Spec, dict[str, Any]]:
  """The soft prompt with the vectors that the MLP computes."""
  options = tuple(o for o in spec.options if o[0] != 'hidden')
  return Spec('prompt', options), {'vectors': _vectors(arrays)}


METHOD = Method(
  module=PTuning,
  roles=prompt_tuning.METHOD.roles,
  once=True,
  why_not=prompt_tuning.METHOD.why_not,
  fold=fold,
  not_pooled=(
    'it is served as the prompt that its MLP computes; name that, as in '
    'prompt(length=20)'
  ),
)
