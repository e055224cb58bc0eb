# SPDX-License-Identifier: Apache-2.0
"""Parameter-efficient fine-tuning: methods, and building and merging them."""

from moepeft.peft.build import Built as Built
from moepeft.peft.build import build as build
from moepeft.peft.method import Method as Method
from moepeft.peft.methods import METHODS as METHODS
