# SPDX-License-Identifier: Apache-2.0
"""A thin agent layer: tools, a loop and skills over a chat server's API."""
