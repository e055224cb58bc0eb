# SPDX-License-Identifier: Apache-2.0
"""Translates long texts: draft, reflection, improvement; measured by BLEU."""
