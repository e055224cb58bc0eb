# SPDX-License-Identifier: Apache-2.0
"""What evaluations are made of: figures of answers, without any model."""
