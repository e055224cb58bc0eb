# SPDX-License-Identifier: Apache-2.0
"""PEFT methods, one a file."""
