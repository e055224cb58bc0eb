# SPDX-License-Identifier: Apache-2.0
"""Operations research by agents: a text becomes a program with an optimum."""
