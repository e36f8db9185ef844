"""What is served, as the side without torch knows it."""

import time
from collections.abc import Mapping
from typing import Any


class Model:
    """What is known of the model on this side: ``facts`` as shoal.serve.target tells them."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self.name = str(facts["name"])
        self.task = str(facts["task"])
        self.created = int(time.time())
