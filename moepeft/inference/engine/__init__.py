# SPDX-License-Identifier: Apache-2.0
"""The inference engine: scheduler, KV cache, prefix cache."""
