# SPDX-License-Identifier: Apache-2.0
"""Support of a telephone company: a MoLoRA adapter, retrieval, and both."""
