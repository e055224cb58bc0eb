# SPDX-License-Identifier: Apache-2.0
"""A shop's customer service: states, slots, answers and a hand-over."""
