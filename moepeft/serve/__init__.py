# SPDX-License-Identifier: Apache-2.0
"""Trained checkpoints as a server with the API that every client speaks."""
