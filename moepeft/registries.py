# SPDX-License-Identifier: Apache-2.0
"""The registries of names in a config, by config key."""

from collections.abc import Mapping
from typing import Any

from moepeft.data.readers import READERS
from moepeft.models import FAMILIES
from moepeft.objectives import OBJECTIVES
from moepeft.training.optimizers import OPTIMIZERS, SCHEDULES

BY_KEY: Mapping[str, Mapping[str, Any]] = {
  'model.family': FAMILIES,
  'objective': OBJECTIVES,
  'data.source': READERS,
  'optimizer.name': OPTIMIZERS,
  'optimizer.schedule': SCHEDULES,
}
