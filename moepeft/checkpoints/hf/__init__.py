# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's and peft's formats, in and out."""
