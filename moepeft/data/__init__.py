# SPDX-License-Identifier: Apache-2.0
"""Examples, tokenizers and batches."""

from moepeft.data.dataset import TrainingData as TrainingData
from moepeft.data.loader import make_loader as make_loader
from moepeft.data.loader import truncation_warning as truncation_warning
from moepeft.data.sources import open_data as open_data
from moepeft.data.tokenizers.tokenizer import load_tokenizer as load_tokenizer
