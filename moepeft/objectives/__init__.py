# SPDX-License-Identifier: Apache-2.0
"""Objectives: pure functions `(apply, variables, batch, rngs) -> ...`.

A new one is one new file and one line in OBJECTIVES.
"""

from moepeft.objectives import seq2seq

OBJECTIVES = {'seq2seq': seq2seq.objective}
