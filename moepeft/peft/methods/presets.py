# SPDX-License-Identifier: Apache-2.0
"""Published mixtures: presets of `mixture` with their papers' values."""

from moepeft.peft.method import Method
from moepeft.peft.methods import ia3, lora
from moepeft.peft.mixture import Mixture, mixture_of

# Its expert, and with that its facts, come from the method string.
MIXTURE = Method(Mixture, roles={})

# Zadouri et al., arXiv:2309.05444. The router reads the projection's whole
# input; the experts' A and B are drawn and scaled as in LoRA.
MOLORA = mixture_of(lora.METHOD)

# The same paper. The released code routes each head of a projected key or value
# apart; the paper's text routes the whole output.
MOV = mixture_of(
  ia3.METHOD,
  values={'reads': 'heads'},
  defaults={'official': {'reads': 'heads'}, 'paper': {'reads': 'output'}},
)
