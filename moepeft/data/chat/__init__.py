# SPDX-License-Identifier: Apache-2.0
"""Conversations: formats, templates, tokens and loss masks."""
