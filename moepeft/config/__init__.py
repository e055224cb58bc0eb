# SPDX-License-Identifier: Apache-2.0
"""Configs: default keys, checks, flags and method strings.

A config file calls `default`, changes keys and returns the result:

  from moepeft import config

  def get_config():
    c = config.default()
    c.method = 'mov(experts=10)'
    return c
"""

from moepeft.config.defaults import ablation as ablation
from moepeft.config.defaults import default as default
from moepeft.config.defaults import finetuning as finetuning
from moepeft.config.defaults import paper as paper
from moepeft.config.defaults import values as values
