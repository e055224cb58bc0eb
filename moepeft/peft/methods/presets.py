# SPDX-License-Identifier: Apache-2.0
"""Published mixtures: presets of `mixture` with their papers' values.

configs/methods/ has a config of each with the paper's training settings, and
says where paper and released code differ.
"""

from moepeft.peft.kinds import kind_entry, kinds_of
from moepeft.peft.method import Method
from moepeft.peft.methods import bottleneck, ffn_lora, ia3, lora, moslora
from moepeft.peft.mixture import Mixture, mixture_of

# Its expert, and with that its facts, come from the method string.
MIXTURE = Method(Mixture, roles={})

_ATTENTION = ('query', 'key', 'value', 'output')
_FEED_FORWARD = ('gate', 'up', 'down')


def _at(*roles: str) -> dict[str, tuple[str, ...]]:
  return {'official': roles, 'paper': roles}


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

# Li et al., arXiv:2404.15159: whole feed-forwards as experts. The paper's LoRA
# on the attention is a second adapter; see configs/methods/mixlora.py.
MIXLORA = mixture_of(
  ffn_lora.METHOD,
  values={
    'experts': 8,
    'rank': 16,
    'alpha': 32.0,
    'dropout': 0.05,
    'a_init': 'kaiming',
  },
  router='topk(k=2, renormalize=True)',
)

# Gao et al., arXiv:2402.08562: more experts in higher layers.
MOLA = mixture_of(
  lora.METHOD,
  values={
    'experts_per_layer': 'inverted_triangle',
    'rank': 8,
    'alpha': 16.0,
    'dropout': 0.05,
    'a_init': 'kaiming',
  },
  roles=_at(*_ATTENTION, *_FEED_FORWARD),
  router="topk(k=2, renormalize=True, kernel_init='kaiming')",
)

# Tian et al., arXiv:2404.19245: one A for all experts.
HYDRALORA = mixture_of(
  lora.METHOD,
  values={
    'experts': 4,
    'rank': 4,
    'alpha': 32.0,
    'dropout': 0.05,
    'share': 'a',
    'a_init': 'kaiming',
  },
  roles=_at(*_FEED_FORWARD),
  router="softmax(kernel_init='kaiming')",
)

# Liu and Luo, arXiv:2405.00361: experts above a learned threshold.
ADAMOLE = mixture_of(
  lora.METHOD,
  values={
    'experts': 8,
    'rank': 4,
    'alpha': 16.0,
    'dropout': 0.05,
    'a_init': 'kaiming',
  },
  roles=_at(*_ATTENTION),
  router="threshold(kernel_init='kaiming')",
)

# Zou et al., arXiv:2510.08396: 32 experts of rank one, routed by how large the
# frozen, sparse down-projection of the input is.
FLYLORA = mixture_of(
  lora.METHOD,
  values={
    'experts': 32,
    'rank': 1,
    'alpha': 2.0,
    'reads': 'down',
    'a_init': 'sparse',
    'train_a': False,
  },
  roles=_at(*_ATTENTION, *_FEED_FORWARD),
  router='magnitude(k=8)',
)

# Ostapenko et al., arXiv:2405.11157: trained adapters, routed by the direction
# that each of them changes most.
ARROW = mixture_of(lora.METHOD, router='arrow(k=3)')

# Muqeeth et al., arXiv:2402.05859: trained adapters, routed by the gate that
# was trained for each of them.
PHATGOOSE = mixture_of(
  lora.METHOD,
  values={'rank': 16, 'alpha': 1.0},
  roles=_at(*_ATTENTION, *_FEED_FORWARD),
  router='phatgoose(k=2)',
)

# Molavi et al., arXiv:2606.31413: trained adapters, exactly one of them for a
# token in a feed-forward.
HARDROUTED = mixture_of(
  lora.METHOD,
  values={'rank': 128, 'alpha': 256.0, 'share_routing': True},
  roles=_at(*_FEED_FORWARD),
  router="hard(kernel_init='kaiming')",
)

# Buehler and Buehler, arXiv:2402.07148: trained adapters, weighted at each site
# and token by what a first pass of the base makes of the token.
XLORA = mixture_of(
  lora.METHOD,
  values={'reads': 'first_pass'},
  router="softmax(kernel_init='kaiming', bias=True)",
)

# arXiv:2603.00573: r x r cores between one A and one B, at LoRA's price. The
# router reads x A.
COMOL = mixture_of(
  moslora.METHOD,
  values={
    'experts': 12,
    'rank': 16,
    'alpha': 16.0,
    'dropout': 0.1,
    'share': 'ab',
    'reads': 'down',
    'a_init': 'kaiming',
  },
  roles=_at(*_ATTENTION, 'down'),
  router="softmax(kernel_init='kaiming')",
)

# arXiv:2504.00661: more experts for tokens of which the router is not sure.
DYNMOLE = mixture_of(
  lora.METHOD,
  values={'experts': 8, 'rank': 8, 'alpha': 16.0, 'a_init': 'kaiming'},
  roles=_at(*_ATTENTION, *_FEED_FORWARD),
  router="entropy_adaptive(kernel_init='kaiming')",
)

# arXiv:2509.25684: sparse weights whose sparsity each token learns.
LDMOLE = mixture_of(
  lora.METHOD,
  values={
    'experts': 8,
    'rank': 8,
    'alpha': 16.0,
    'dropout': 0.1,
    'a_init': 'kaiming',
  },
  roles=_at(*_ATTENTION, *_FEED_FORWARD),
  # One MLP of 256 units for each width serves the whole net there.
  router="sparsegen(hidden=16, kernel_init='kaiming')",
)

# Dou et al., arXiv:2312.09979: a balance of experts within two groups.
LORAMOE = mixture_of(
  lora.METHOD,
  values={
    'experts': 8,
    'rank': 4,
    'alpha': 32.0,
    'dropout': 0.05,
    'a_init': 'kaiming',
  },
  roles=_at(*_FEED_FORWARD),
  router="localized(kernel_init='kaiming')",
)

# Liu et al., arXiv:2310.18339: one routing for each task. The paper's rank of
# 16 and alpha of 32 are those of all experts together.
MOELORA = mixture_of(
  lora.METHOD,
  values={'experts': 8, 'rank': 2, 'alpha': 4.0, 'dropout': 0.1},
  roles=_at(*_ATTENTION, *_FEED_FORWARD),
  router='task',
)

# Muqeeth et al., arXiv:2306.03745: one adapter of merged parameters for each
# example. The size is that of T5 base, 768 / 32.
SMEAR = mixture_of(
  bottleneck.METHOD,
  values={
    'experts': 8,
    'size': 24,
    'activation': 'silu',
    'combine': 'parameters',
  },
  router='sentence(dropout=0.1)',
)

# Ponti et al., arXiv:2202.13914: low-rank skills, merged for each task.
POLY = mixture_of(
  lora.METHOD,
  values={
    'experts': 4,
    'rank': 8,
    'alpha': 1.0,
    'combine': 'parameters',
    'a_init': 'kaiming',
  },
  router='poly',
)

# Caccia et al., arXiv:2211.03831: Poly with weights for each part of the inputs
# and outputs.
MHR = mixture_of(
  lora.METHOD,
  values={
    'experts': 4,
    'rank': 8,
    'alpha': 1.0,
    'combine': 'parameters',
    'a_init': 'kaiming',
  },
  router='poly(splits=4)',
)

# Fan et al., arXiv:2502.16894: each expert starts from a part of the kernel's
# singular values. The paper's rank of 8 is that of all experts together.
GOAT = mixture_of(
  lora.METHOD,
  values={
    'experts': 8,
    'rank': 1,
    'alpha': 16.0,
    'dropout': 0.05,
    'init_weights': 'svd_chunks',
  },
  roles=_at(*_ATTENTION, *_FEED_FORWARD),
  router="topk(k=2, renormalize=True, kernel_init='kaiming')",
)

# Liao et al., openreview lTkHiXeuDl: routed by token in low layers, by prompt
# in high ones. The released script has plain LoRA at the output and down
# projections; see configs/methods/hmora.py.
HMORA = mixture_of(
  lora.METHOD,
  values={
    'experts': 8,
    'rank': 8,
    'alpha': 8.0,
    'rslora': True,
    'dropout': 0.1,
    'share': 'a',
    'share_router': True,
    'a_init': 'kaiming',
  },
  roles=_at('query', 'key', 'value', 'gate', 'up'),
  router='hybrid(k=2)',
)

# Wang et al., arXiv:2205.12410: a random expert in training, merged parameters
# after it. The projection up is that of all experts.
ADAMIX = mixture_of(
  bottleneck.METHOD,
  values={
    'experts': 4,
    'size': 16,
    'activation': 'gelu_exact',
    'share': 'up',
    'combine': 'parameters',
  },
  roles=_at('mlp'),
  router='random_then_mean',
)

# Zhong et al., arXiv:2407.09946: four A's for the layers of a stack, and four
# B's for all of them, which each layer's router mixes by x A.
LILY = mixture_of(
  lora.METHOD,
  values={
    'experts': 4,
    'rank': 16,
    'alpha': 16.0,
    'share': 'a',
    'reads': 'down',
    'a_init': 'kaiming',
    'a_groups': 4,
    'b_groups': 1,
  },
  roles=_at('query', 'key', 'value'),
  router="softmax(kernel_init='kaiming')",
)

# Ning et al., arXiv:2408.01505: one A, and a router for each of its columns
# over rank-one experts.
MODE = mixture_of(lora.METHOD, values={'share': 'a', 'by_column': True})

# Cao et al., arXiv:2506.05928: LoRA at five projections and a bottleneck beside
# the feed-forward, each with a gate of its own, of one router for a layer.
MOA = mixture_of(
  kinds_of(
    (
      *(
        kind_entry(
          'lora',
          lora.METHOD,
          f'*/{site}',
          rank=8,
          alpha=8.0,
          a_init='kaiming',
        )
        for site in ('q', 'k', 'v', 'o', 'wo')
      ),
      kind_entry(
        'bottleneck',
        bottleneck.METHOD,
        '*/mlp',
        size=16,
        activation='silu',
        place='parallel',
      ),
    ),
    takes_options=True,
  ),
  values={'experts': 1, 'share_routing': True},
  router="sigmoid(hidden=4, bias=True, kernel_init='kaiming')",
)
