# SPDX-License-Identifier: Apache-2.0
"""Losses of answers that were compared or judged: pure functions of [b].

A ratio is log pi(y|x) - log pi_ref(y|x) of an answer's tokens, summed over
them unless it says mean; h is the chosen's ratio less the rejected's. Papers
are named without numbers of equations, which differ between their versions;
where TRL computes something else, it is said.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moepeft.core.types import Array

LOSSES = ('sigmoid', 'hinge', 'ipo', 'robust')
# What of config.preference each objective looks at.
USED = {
  'dpo': ('loss', 'beta', 'label_smoothing', 'sft', 'reference'),
  'kto': ('beta', 'desirable', 'undesirable', 'sft', 'reference'),
  'orpo': ('beta',),
  'simpo': ('beta', 'margin', 'label_smoothing', 'sft'),
  'reward': (),
}


@dataclasses.dataclass(frozen=True)
class Preference:
  """What config.preference says, less what rewards are measured against.

  Attributes:
    loss: of LOSSES, dpo's.
    beta: how much a ratio counts; orpo's is the weight of its odds ratio.
    label_smoothing: the share of comparisons taken to be the wrong way round.
    sft: weight of the chosen answer's mean -log p of a token, each answer's
      own as in Pang et al., arXiv:2404.19733 (TRL: of all tokens of a batch).
    margin: simpo's target margin, over beta.
    desirable, undesirable: kto's weights of good and of bad answers.

  Raises:
    ValueError: a value cannot be; the message names its key.
  """

  loss: str = 'sigmoid'
  beta: float = 0.1
  label_smoothing: float = 0.0
  sft: float = 0.0
  margin: float = 0.5
  desirable: float = 1.0
  undesirable: float = 1.0

  def __post_init__(self):
    if self.loss not in LOSSES:
      raise ValueError(
        f'config.preference.loss is one of {", ".join(LOSSES)}; got '
        f'{self.loss!r}'
      )
    if self.beta <= 0:
      raise ValueError(f'config.preference.beta is above 0; got {self.beta!r}')
    if not 0 <= self.label_smoothing < 0.5:
      raise ValueError(
        'config.preference.label_smoothing is at least 0 and below 0.5, where '
        f'labels would say nothing; got {self.label_smoothing!r}'
      )
    if self.label_smoothing and self.loss in ('hinge', 'ipo'):
      raise ValueError(
        'config.preference.label_smoothing is of the losses sigmoid and '
        f'robust; with {self.loss!r} it does nothing, set it to 0'
      )
    if self.loss == 'robust' and not self.label_smoothing:
      raise ValueError(
        "config.preference.loss='robust' without label_smoothing is 'sigmoid'; "
        'set config.preference.label_smoothing to the share of wrong labels'
      )
    for key in ('sft', 'margin', 'desirable', 'undesirable'):
      if getattr(self, key) < 0:
        raise ValueError(
          f'config.preference.{key} is not negative; got {getattr(self, key)!r}'
        )


PLAIN = Preference()


def preference_of(name: str, values: Mapping[str, Any]) -> Preference:
  """config.preference as an objective takes it.

  Args:
    name: of the objective; one not in USED takes nothing of it.

  Raises:
    ValueError: a key was set that the objective does not look at.
  """
  fields = {f.name: f.default for f in dataclasses.fields(Preference)}
  used = USED.get(name, ())
  for key, default in (fields | {'reference': 'base'}).items():
    if values[key] != default and key not in used:
      owners = ' or '.join(o for o, keys in USED.items() if key in keys)
      raise ValueError(
        f'config.preference.{key}={values[key]!r} does nothing with '
        f'config.objective={name!r}, only with {owners}; set one of the two'
      )
  return Preference(**{key: values[key] for key in fields})


def dpo(h: Array, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
  """-(1 - s) log sigma(beta h) - s log sigma(-beta h): [b].

  Source: Rafailov et al., arXiv:2305.18290; with s > 0 the conservative form
  of Mitchell, 'A note on DPO with noisy preferences and relationship to IPO'.
  """
  s = label_smoothing
  log_sigma = jax.nn.log_sigmoid
  return -(1 - s) * log_sigma(beta * h) - s * log_sigma(-beta * h)


def robust(h: Array, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
  """The loss that flipped labels leave unbiased: [b].

  Source: Chowdhury et al., arXiv:2403.00409: ((1 - s) L(h) - s L(-h)) /
  (1 - 2 s), L the sigmoid loss; each comparison is the wrong way round with
  probability s.
  """
  s = label_smoothing
  right, wrong = dpo(h, beta), dpo(-h, beta)
  return ((1 - s) * right - s * wrong) / (1 - 2 * s)


def hinge(h: Array, beta: float = 0.1) -> Array:
  """max(0, 1 - beta h): [b].

  Source: Liu et al., arXiv:2309.06657: the loss of SLiC (Zhao et al.,
  arXiv:2305.10425, without a reference there) of ratios.
  """
  return jax.nn.relu(1 - beta * h)


def ipo(mean_h: Array, beta: float = 0.1) -> Array:
  """(h - 1 / (2 beta))^2: [b].

  Source: Azar et al., arXiv:2310.12036, whose tau is beta and whose h is of
  sums. Here as in TRL, which asked the authors, it is of means over each
  answer's tokens: the target 1 / (2 beta) then does not ask more of a short
  answer's token than of a long one's.

  Args:
    mean_h: the chosen's mean ratio less the rejected's.
  """
  return (mean_h - 1 / (2 * beta)) ** 2


def kto(
  ratio: Array,
  label: Array,
  point: Array,
  beta: float = 0.1,
  desirable: float = 1.0,
  undesirable: float = 1.0,
) -> Array:
  """lambda (1 - sigma(+-beta (ratio - point))): [b].

  Source: Ethayarajh et al., arXiv:2402.01306: lambda_y - v(x, y), which is
  not negative.

  Args:
    ratio: of each answer.
    label: bool [b], whether it is a good one.
    point: [] or [b], of `reference_point`; no gradient goes through it.
    desirable, undesirable: lambda of good and of bad answers.
  """
  gain = beta * (ratio - jax.lax.stop_gradient(point))
  value = jax.nn.sigmoid(jnp.where(label, gain, -gain))
  return jnp.where(label, desirable, undesirable) * (1 - value)


def reference_point(ratios: Array, real: Array) -> Array:
  """max(0, mean ratio) of mismatched answers, without gradient: [].

  An estimate of KL(pi || pi_ref) by answers to other prompts, as in
  arXiv:2402.01306 and TRL. Here it is of the whole batch, however many parts
  it is computed in (TRL: of each part), and a prompt's other answer is always
  the same one (TRL: of its neighbour in each batch).

  Args:
    ratios: [b], of each prompt with the answer to another.
    real: bool [b], which rows count.
  """
  total = jnp.sum(jnp.where(real, ratios, 0))
  mean = total / jnp.maximum(jnp.sum(real), 1)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def log_odds(mean_log_p: Array) -> Array:
  """log(p / (1 - p)) of p = exp(mean log p), below 1: [b].

  A p of 1 in float32 would have no odds; it counts as 1 - 2^-24.
  """
  below = jnp.minimum(mean_log_p, -(2.0**-24))
  return below - jnp.log(-jnp.expm1(below))


def orpo(chosen: Array, rejected: Array, beta: float = 0.1) -> Array:
  """-chosen - beta log sigma(log odds(chosen) - log odds(rejected)): [b].

  Source: Hong et al., arXiv:2403.07691, whose lambda is beta. The first term
  is each answer's own mean; TRL takes it of prompt and answer, and of all
  tokens of a batch at once.

  Args:
    chosen, rejected: mean log p of an answer's tokens.
  """
  ratio = log_odds(chosen) - log_odds(rejected)
  return -chosen - beta * jax.nn.log_sigmoid(ratio)


def simpo(
  chosen: Array,
  rejected: Array,
  beta: float = 0.1,
  margin: float = 0.5,
  label_smoothing: float = 0.0,
) -> Array:
  """-log sigma(beta (chosen - rejected - margin)): [b].

  Source: Meng et al., arXiv:2405.14734, whose gamma is beta times `margin`
  (TRL sets gamma itself: margin is simpo_gamma / beta); they use beta 2 and
  more. Smoothed as `dpo`.

  Args:
    chosen, rejected: mean log p of an answer's tokens.
  """
  return dpo(chosen - rejected - margin, beta, label_smoothing)


def reward(chosen: Array, rejected: Array) -> Array:
  """-log sigma(r_chosen - r_rejected): [b].

  Source: Ouyang et al., arXiv:2203.02155, of one pair a prompt: the
  likelihood of Bradley and Terry's model.
  """
  return -jax.nn.log_sigmoid(chosen - rejected)
